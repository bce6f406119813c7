"""Variational families as small modules that hang on a layer as ``layer.noise``."""

from vardrop.noise.base import Layout as Layout
from vardrop.noise.base import Noise as Noise
from vardrop.noise.base import noises_of as noises_of
from vardrop.noise.unit import BernoulliNoise as BernoulliNoise
from vardrop.noise.weight import AdditiveNoise as AdditiveNoise
from vardrop.noise.weight import MultiplicativeNoise as MultiplicativeNoise
from vardrop.noise.weight import WeightNoise as WeightNoise
