"""A converted net under torch.compile takes batches of any size, such as the smaller last one of an epoch."""

import pytest
import torch
from cases import LAYERS, VARIANTS

from vardrop.elbo import kl

PAIRS = {
    f"{layer}-{name}": (LAYERS[layer], method)
    for layer, names in (("linear", VARIANTS), ("conv2d", ("sparse-vd", "beta-bernoulli", "bernoulli-dropout")))
    for name, method in VARIANTS.items()
    if name in names and LAYERS[layer].takes(method)
}


@pytest.mark.parametrize(("case", "method"), PAIRS.values(), ids=PAIRS.keys())
def test_a_compiled_net_takes_batches_of_any_size(case, method):
    torch.compiler.reset()
    net = case.converted(method).train()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.cat([case.input()] * 2)
    for size in (3, 5, 4):
        torch.manual_seed(0)
        output = compiled(x[:size])
        (output.sum() + kl(net)).backward()
        torch.manual_seed(0)
        torch.testing.assert_close(output, net(x[:size]), rtol=1e-4, atol=1e-5)
