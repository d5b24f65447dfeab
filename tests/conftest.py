"""One thread for the tests: their tensors are small, and on a shared machine every barrier costs a time slice. Tests of
threading set the number themselves."""

import signal

import torch

torch.set_num_threads(1)
# A shell has what it starts in the background ignore SIGINT, as would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
