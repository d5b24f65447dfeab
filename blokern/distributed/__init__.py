"""Several processes that train one network, on torch.distributed; and what they have to agree upon."""

from blokern.distributed.batch_norm import SyncBatchNorm, sync_batch_norm
from blokern.distributed.processes import Processes, joined
from blokern.distributed.selection import topk_mask

__all__ = ["Processes", "SyncBatchNorm", "joined", "sync_batch_norm", "topk_mask"]
