"""vardrop makes PyTorch networks Bayesian, sparse and really smaller.

convert -> train with ELBO -> prune -> compact -> save, export, measure.
"""

from vardrop import functional as functional
from vardrop import metrics as metrics
from vardrop import uncertainty as uncertainty
from vardrop import warmup as warmup
from vardrop.ablate import ablate as ablate
from vardrop.baselines import AdversarialDropout as AdversarialDropout
from vardrop.baselines import DynamicNetworkSurgery as DynamicNetworkSurgery
from vardrop.baselines import MagnitudePruning as MagnitudePruning
from vardrop.baselines import SoftWeightSharing as SoftWeightSharing
from vardrop.baselines import StructuredSparsityLearning as StructuredSparsityLearning
from vardrop.baselines import baselines as baselines
from vardrop.cite import cite as cite
from vardrop.compare import measure as measure
from vardrop.elbo import ELBO as ELBO
from vardrop.elbo import kl as kl
from vardrop.export import export_onnx as export_onnx
from vardrop.fast import fast as fast
from vardrop.io import load as load
from vardrop.io import save as save
from vardrop.measure import summary as summary
from vardrop.methods import ARD as ARD
from vardrop.methods import VBD as VBD
from vardrop.methods import BernoulliDropout as BernoulliDropout
from vardrop.methods import BetaBernoulli as BetaBernoulli
from vardrop.methods import ConcreteDropout as ConcreteDropout
from vardrop.methods import DependentBetaBernoulli as DependentBetaBernoulli
from vardrop.methods import GammaARD as GammaARD
from vardrop.methods import GaussianDropout as GaussianDropout
from vardrop.methods import Method as Method
from vardrop.methods import SparseVD as SparseVD
from vardrop.methods import StructuredBP as StructuredBP
from vardrop.methods import StructuredVBD as StructuredVBD
from vardrop.methods import StudentT as StudentT
from vardrop.methods import VarianceNetwork as VarianceNetwork
from vardrop.methods import VariationalDropout as VariationalDropout
from vardrop.methods import methods as methods
from vardrop.predict import draws as draws
from vardrop.predict import noise as noise
from vardrop.predict import predict as predict
from vardrop.sites import parameter_groups as parameter_groups
from vardrop.sites import sites as sites
from vardrop.surgery.compact import compact as compact
from vardrop.surgery.convert import convert as convert
from vardrop.surgery.convert import strip as strip
from vardrop.surgery.prune import prune as prune
from vardrop.surgery.prune import unprune as unprune
from vardrop.surgery.selection import select_inputs as select_inputs
from vardrop.surgery.shrink import shrink as shrink
from vardrop.surgery.vocabulary import shrink_vocabulary as shrink_vocabulary

__version__ = "0.1.0"
