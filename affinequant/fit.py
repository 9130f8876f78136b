"""The verb `fit`, and what it takes and gives: the quantiser's training loop is anyone's."""

from affinequant.learning.fit import FitConfig as FitConfig
from affinequant.learning.fit import FitReport as FitReport
from affinequant.learning.fit import Objective as Objective
from affinequant.learning.fit import fit as fit
from affinequant.learning.optimizers import Group as Group
