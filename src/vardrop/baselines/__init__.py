"""What the papers compare with: methods without a posterior, converted, pruned and compacted by the same road."""

from vardrop.baselines.adversarial import AdversarialDropout as AdversarialDropout
from vardrop.baselines.magnitude import MagnitudePruning as MagnitudePruning
from vardrop.baselines.sharing import SoftWeightSharing as SoftWeightSharing
from vardrop.baselines.structured import StructuredSparsityLearning as StructuredSparsityLearning
from vardrop.baselines.surgery import DynamicNetworkSurgery as DynamicNetworkSurgery
from vardrop.methods.base import Method


def baselines() -> dict[str, type[Method]]:
    """Every baseline by its name on the command line.

    >>> vd.baselines()["magnitude-pruning"]
    <class 'vardrop.baselines.magnitude.MagnitudePruning'>
    """
    found = [value for value in globals().values() if isinstance(value, type) and issubclass(value, Method)]
    return {cls.command_name(): cls for cls in found if cls is not Method}
