"""Fixed patterns: who reads whom, known from positions alone.

  pattern                      | name              | is
  -----------------------------|-------------------|------------------
  causal, sliding window       | pallas_kernels    | rules
  first tokens and a window    | `Sinks`           | a rule
  every d-th of a window       | `Dilated`         | a rule
  slashes, verticals           | `Diagonals`, ...  | rules
  both                         | `stripes`         | a rule
  window and every s-th behind | `Strided`         | a rule
  window and global tokens     | `Longformer`      | a rule
  windows in 1 to 3 dimensions | `Neighborhood`    | a rule
  strided, another a head      | `s2`              | a BlockMask
  window, global, random       | `bigbird`         | a BlockMask
  butterfly                    | `butterfly`       | a BlockMask

A rule says of two positions whether one reads the other, and of two ranges of
positions whether all, some or no pairs are read, in closed form. `mask` lists
the blocks of which it leaves something. Rules join by `&` and `|`, and so do
BlockMasks of equal blocks.
"""

from sparsejax.attention.patterns.blocks import bigbird
from sparsejax.attention.patterns.blocks import bigbird_random
from sparsejax.attention.patterns.blocks import butterfly
from sparsejax.attention.patterns.blocks import s2
from sparsejax.attention.patterns.lines import Columns
from sparsejax.attention.patterns.lines import Diagonals
from sparsejax.attention.patterns.lines import Dilated
from sparsejax.attention.patterns.lines import Longformer
from sparsejax.attention.patterns.lines import Sinks
from sparsejax.attention.patterns.lines import Strided
from sparsejax.attention.patterns.lines import stripes
from sparsejax.attention.patterns.listing import mask
from sparsejax.attention.patterns.neighborhood import Neighborhood
