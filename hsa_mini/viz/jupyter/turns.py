"""Pictures and cells take turns, because they share models and figures."""

import threading

from IPython.core.getipython import get_ipython


class Turns:
    """One picture is drawn at a time, and none while a cell runs.

    JupyterLab moves controls in a second thread of the kernel, and just after the start of the
    kernel in both threads. Whoever draws holds `lock`. cells: how many cells have begun.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cells = 0
        self._in_cell = False

    def include_cells(self) -> None:
        """From now on every cell of this kernel takes a turn, beginning with the one that runs."""
        shell = get_ipython()
        if shell is None or self._begin_cell in shell.events.callbacks["pre_execute"]:
            return
        shell.events.register("pre_execute", self._begin_cell)
        shell.events.register("post_execute", self._end_cell)
        self._begin_cell()

    def _begin_cell(self) -> None:
        if not self._in_cell and threading.current_thread() is threading.main_thread():
            self.lock.acquire()
            self.cells += 1
            self._in_cell = True

    def _end_cell(self) -> None:
        if self._in_cell and threading.current_thread() is threading.main_thread():
            self._in_cell = False
            self.lock.release()


TURNS = Turns()
