"""What does happen: the same programs that are simulated, performed on torch.distributed.

Imports the planner's values, never its simulator. Everything private of torch is in `executor.torch_adapter`.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces every start and stop on stderr
