"""What a researcher need not read to use or change the training loop: files, devices, data, memory, pictures.

Nothing here imports the modules at the project's root; they import from here.
"""

import os
import tempfile

# A user without HOME and without an entry in the password file, as in some containers: libraries that look for the home
# folder when they are imported would fail, some of them only after the training.
if os.path.expanduser("~") == "~":
    os.environ["HOME"] = tempfile.gettempdir()

# torch's threads wait for each other by spinning, by default so long that a step takes 20 times as long where another
# program keeps a core busy. On a quiet machine this shorter time makes no difference. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
