"""Transformers you can see through."""

from sightline.attention import attention as attention
from sightline.attention import observe as observe
from sightline.masks import Allowed as Allowed
from sightline.masks import ALiBi as ALiBi
from sightline.masks import Bias as Bias
from sightline.masks import Causal as Causal
from sightline.masks import Mask as Mask
from sightline.masks import Padding as Padding
from sightline.masks import Window as Window
from sightline.observation import Observation as Observation
from sightline.shapes import ShapeError as ShapeError

__version__ = "0.1.0"
