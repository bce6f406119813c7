"""The methods: one file and one export line each."""

from vardrop.methods.ard import ARD as ARD
from vardrop.methods.base import Listing
from vardrop.methods.base import Method as Method
from vardrop.methods.beta_bernoulli import BetaBernoulli as BetaBernoulli
from vardrop.methods.concrete import ConcreteDropout as ConcreteDropout
from vardrop.methods.dependent import DependentBetaBernoulli as DependentBetaBernoulli
from vardrop.methods.dropout import BernoulliDropout as BernoulliDropout
from vardrop.methods.dropout import GaussianDropout as GaussianDropout
from vardrop.methods.gamma_ard import GammaARD as GammaARD
from vardrop.methods.sparse_vd import SparseVD as SparseVD
from vardrop.methods.structured_bp import StructuredBP as StructuredBP
from vardrop.methods.structured_vbd import StructuredVBD as StructuredVBD
from vardrop.methods.student_t import StudentT as StudentT
from vardrop.methods.variance import VarianceNetwork as VarianceNetwork
from vardrop.methods.variational import VariationalDropout as VariationalDropout
from vardrop.methods.vbd import VBD as VBD


def methods() -> Listing:
    """Every method by its name on the command line, printed with one line each; see :func:`vardrop.baselines`.

    >>> vd.methods()["sparse-vd"]
    <class 'vardrop.methods.sparse_vd.SparseVD'>
    """
    return Listing.of(globals())
