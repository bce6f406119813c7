"""Networks and data by name."""

from vardrop.zoo.batches import Batches as Batches
from vardrop.zoo.data import DATASETS as DATASETS
from vardrop.zoo.data import Data as Data
from vardrop.zoo.data import Split as Split
from vardrop.zoo.data import load_data as load_data
from vardrop.zoo.data import load_inputs as load_inputs
from vardrop.zoo.data import validation_split as validation_split
from vardrop.zoo.nets import NETS as NETS
from vardrop.zoo.nets import build_net as build_net
from vardrop.zoo.nets import check_fits as check_fits
