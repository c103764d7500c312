"""Fewer heads: which maps between heads leave a model's function alone, and how to merge heads along them.

Neighbouring KV heads share no coordinates: the mean of two of them is close to the mean of two random vectors. But a head may be turned without
changing the model: values by any orthogonal matrix that the output projection undoes, keys and queries by any matrix that commutes with the rotary
embedding, which is a rotation of each rotary pair, and any orthogonal matrix on channels without rotary embedding. `aligned` finds
the rotations that bring the heads of a group closest together (generalised Procrustes on the second moments of what the projections put
out), pools, and gives the pooled block the norm of its members. `svd` allows more than rotations and is the best D-dimensional approximation of a group.

Which channels form rotary pairs is not read from names: `find_freedom` runs the attention modules on unit vectors and looks.
"""

from attnconvert.surgery.regroup.exports import as_stock, stock_config
from attnconvert.surgery.regroup.freedom import find_freedom, random_turns, second_moments, turned
from attnconvert.surgery.regroup.grouping import GROUPINGS, usual_grouping
from attnconvert.surgery.regroup.heads import Freedom, HeadMaps, Projections, fold, rotation
from attnconvert.surgery.regroup.inits import CALIBRATED, INITS, regroup_layer
from attnconvert.surgery.regroup.layout import projection_form, projection_tensors, read_projections
from attnconvert.surgery.regroup.model import Regrouped, check_architecture, install, installed, regroup
from attnconvert.surgery.regroup.queries import sqa_name

__all__ = [
    "CALIBRATED",
    "GROUPINGS",
    "INITS",
    "Freedom",
    "HeadMaps",
    "Projections",
    "Regrouped",
    "as_stock",
    "check_architecture",
    "find_freedom",
    "fold",
    "install",
    "installed",
    "projection_form",
    "projection_tensors",
    "random_turns",
    "read_projections",
    "regroup",
    "regroup_layer",
    "rotation",
    "second_moments",
    "sqa_name",
    "stock_config",
    "turned",
    "usual_grouping",
]
