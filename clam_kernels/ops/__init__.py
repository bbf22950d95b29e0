# SPDX-License-Identifier: Apache-2.0
"""The ops: one file per family, with the documented functions and their `OpSpec`s."""

from . import am as am
from . import dec as dec
from . import kmeans as kmeans
from . import sinkhorn as sinkhorn
from . import xent as xent
