"""One random call of each op, compared with its oracle (comparison.py)."""

from __future__ import annotations

import attack_calls
import curvature_calls
import sparse_calls

CASES = attack_calls.CASES | sparse_calls.CASES | curvature_calls.CASES
