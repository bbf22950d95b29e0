# SPDX-License-Identifier: Apache-2.0
"""The ops: one file a family, each declaring its `OpSpec`s beside the documented functions."""

from . import am as am
from . import dec as dec
from . import kmeans as kmeans
from . import sinkhorn as sinkhorn
