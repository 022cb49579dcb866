"""Prototypical fine-tuning (arXiv:2211.13638): prototypes that grow and shrink with the data.

Importing this package registers everything its gin files name.
"""

from lmops_jax.systems.prototypes.classifier import Classifier, load_classifier
from lmops_jax.systems.prototypes.contrast import Contrast
from lmops_jax.systems.prototypes.encoding import Encoding
from lmops_jax.systems.prototypes.learning import Growth
from lmops_jax.systems.prototypes.means import Means
from lmops_jax.systems.prototypes.methods import Frozen, Head, Prototypical
from lmops_jax.systems.prototypes.rows import InstalledPackages, LabelledFile
from lmops_jax.systems.prototypes.system import Study

__all__ = [
  "Classifier", "Contrast", "Encoding", "Frozen", "Growth", "Head", "InstalledPackages",
  "LabelledFile", "Means", "Prototypical", "Study", "load_classifier"]
