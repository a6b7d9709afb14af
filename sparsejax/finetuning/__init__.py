"""Which parameters change: fine-tuning that trains few of them."""

from sparsejax.finetuning.meters import update_masks
from sparsejax.finetuning.meters import update_sparsity
from sparsejax.finetuning.trained import Blocks
from sparsejax.finetuning.trained import choose
from sparsejax.finetuning.trained import Entries
from sparsejax.finetuning.trained import put
from sparsejax.finetuning.trained import Slice
from sparsejax.finetuning.trained import take
from sparsejax.finetuning.trained import train_only
from sparsejax.finetuning.trained import TrainOnlyState
from sparsejax.finetuning.trained import Whole
