"""Attacks on everything that the project writes and reads: `python tests/faults [ATTACK ...]`.

Each module holds one attack, a function `attack(count, seed, progress) -> Report`. The long forms
take minutes to an hour; `tests/test_faults.py` runs the quick forms.

    power_loss     every state that a file system may leave when power is lost
    crash_points   every file-changing call as the last one, or as one that fails
    kills          signals at random moments of training, saving, evaluating and encoding
    mesh_kills     SIGKILL at random moments of one or both processes of a run
    corruption     random damage to every kind of file that the project reads
    fuzz           random command lines and calls, in a private mount namespace

They share `processes` (a call in a child), `file_calls` (which calls change files), `disk` (what a
file system may keep), `writers` (everything that writes), `readers` (everything that reads) and
`sandbox` (the private mount namespace).
"""
