"""What the papers compare with: methods without a posterior, converted, pruned and compacted by the same road."""

from vardrop.baselines.adversarial import AdversarialDropout as AdversarialDropout
from vardrop.baselines.magnitude import MagnitudePruning as MagnitudePruning
from vardrop.baselines.sharing import SoftWeightSharing as SoftWeightSharing
from vardrop.baselines.structured import StructuredSparsityLearning as StructuredSparsityLearning
from vardrop.baselines.surgery import DynamicNetworkSurgery as DynamicNetworkSurgery
from vardrop.methods.base import Listing


def baselines() -> Listing:
    """Every baseline by its name on the command line, printed with one line each.

    >>> vd.baselines()["magnitude-pruning"]
    <class 'vardrop.baselines.magnitude.MagnitudePruning'>
    >>> print(vd.baselines())
    adversarial-dropout           Adversarial dropout: Bernoulli dropout, and again with the worst mask near ...
    magnitude-pruning             Magnitude pruning: train, drop the smallest weights of each layer, train the ...
    ...
    """
    return Listing.of(globals())
