"""One thread for the tests: their tensors are small, and on a shared machine every barrier costs a time slice. Tests of
threading set the number themselves."""

import torch

torch.set_num_threads(1)
