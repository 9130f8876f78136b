"""The verb `fit`, and what it takes and gives: the quantiser's training loop is anyone's."""

from affinequant.learning.fit import fit as fit
from affinequant.learning.optimizers import Group as Group
from affinequant.learning.training import FitConfig as FitConfig
from affinequant.learning.training import FitReport as FitReport
from affinequant.learning.training import Objective as Objective
