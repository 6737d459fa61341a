"""Tests for your own loss: `assert_exact`, rounding bounds, and hypothesis strategies for batches and partitions.

Imported by name (`import jaxaccum.testing`), since it needs hypothesis.
"""

from jaxaccum.testing.bounds import normwise as normwise
from jaxaccum.testing.bounds import sum_bound as sum_bound
from jaxaccum.testing.collectives import Collective as Collective
from jaxaccum.testing.collectives import collectives as collectives
from jaxaccum.testing.exactness import assert_exact as assert_exact
from jaxaccum.testing.language import Layer as Layer
from jaxaccum.testing.language import Model as Model
from jaxaccum.testing.language import build_model as build_model
from jaxaccum.testing.linen_models import linen_model as linen_model
from jaxaccum.testing.nnx_models import nnx_model as nnx_model
from jaxaccum.testing.strategies import batches as batches
from jaxaccum.testing.strategies import losses as losses
from jaxaccum.testing.strategies import masks as masks
from jaxaccum.testing.strategies import model_batches as model_batches
from jaxaccum.testing.strategies import models as models
from jaxaccum.testing.strategies import partitions as partitions
from jaxaccum.testing.strategies import weights as weights
from jaxaccum.testing.tagged_losses import Loss as Loss
from jaxaccum.testing.tagged_losses import loss_fun as loss_fun
from jaxaccum.testing.tagged_losses import loss_terms as loss_terms
