"""Which papers a model rests on."""

from __future__ import annotations

from torch import nn

from vardrop.sites import sites


def cite(model: nn.Module) -> str:
    """BibTeX of the methods in use in a converted `model`.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.VBD())
    >>> print(vd.cite(net).splitlines()[0])
    @misc{liu2019variational,
    """
    papers = {paper.key: paper for site in sites(model) for paper in site.method.papers(site.parameter)}
    return "\n\n".join(paper.bibtex for paper in papers.values())
