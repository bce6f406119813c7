"""Variational families as small modules that hang on a layer: ``layer.noise`` on weights, ``layer.gate`` on units."""

from vardrop.noise.base import Layout as Layout
from vardrop.noise.base import Noise as Noise
from vardrop.noise.base import child as child
from vardrop.noise.base import noises_of as noises_of
from vardrop.noise.dependent import DependentGate as DependentGate
from vardrop.noise.dependent import InputGate as InputGate
from vardrop.noise.dependent import Inputs as Inputs
from vardrop.noise.dependent import with_first as with_first
from vardrop.noise.gate import Gate as Gate
from vardrop.noise.gate import Place as Place
from vardrop.noise.gates import AdditiveGate as AdditiveGate
from vardrop.noise.gates import BetaBernoulliGate as BetaBernoulliGate
from vardrop.noise.gates import ConcreteGate as ConcreteGate
from vardrop.noise.gates import MultiplicativeGate as MultiplicativeGate
from vardrop.noise.gates import TruncatedLogNormalGate as TruncatedLogNormalGate
from vardrop.noise.mixture import SharedWeights as SharedWeights
from vardrop.noise.pruning import MaskedUnits as MaskedUnits
from vardrop.noise.pruning import MaskedWeights as MaskedWeights
from vardrop.noise.pruning import SplicedWeights as SplicedWeights
from vardrop.noise.unit import AdversarialNoise as AdversarialNoise
from vardrop.noise.unit import BernoulliNoise as BernoulliNoise
from vardrop.noise.weight import AdditiveNoise as AdditiveNoise
from vardrop.noise.weight import MultiplicativeNoise as MultiplicativeNoise
from vardrop.noise.weight import WeightNoise as WeightNoise
from vardrop.noise.weight import ZeroMeanNoise as ZeroMeanNoise
