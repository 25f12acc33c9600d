# SPDX-License-Identifier: Apache-2.0
"""verl loads this at `import verl`, through the entry-point group `verl.plugins`; `RLHF_FAST_VERL=1` switches it on.

verl is only half imported then, so its modules are patched as they are imported. `RLHF_FAST_VERL=policy_loss` also
registers the loss mode "rlhf_fast".
"""

import os

from . import verl
from ._patch import patch_package

switch = os.environ.get("RLHF_FAST_VERL", "0")
if switch not in ("", "0"):
    patch = patch_package("verl", verl.MINORS, verl.targets_of(policy_loss=switch == "policy_loss"), wait=True)
