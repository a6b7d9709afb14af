"""Which parameters change: fine-tuning that trains few of them."""

from sparsejax.finetuning.deltas import compose
from sparsejax.finetuning.deltas import Delta
from sparsejax.finetuning.deltas import delta
from sparsejax.finetuning.masks import block_scores
from sparsejax.finetuning.masks import distance_penalty
from sparsejax.finetuning.masks import fish_mask
from sparsejax.finetuning.masks import fisher_scores
from sparsejax.finetuning.masks import lt_sft_masks
from sparsejax.finetuning.masks import smt_blocks
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
