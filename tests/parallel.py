"""Tests in several processes: `--processes N`, by default one for each of up to four cores.

The processes are forked once all tests are collected, and take one file of tests after the other.
Each passes its reports on to the first process, which prints them as pytest does. Where there is a
GPU, all tests run in one process: CUDA refuses to work after a fork.
"""

import multiprocessing
import os
from multiprocessing import connection

import pytest
import torch

MOST = 4


def pytest_addoption(parser):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    parser.addoption(
        "--processes", type=int, default=min(cores, MOST), metavar="N", help="1: no other process"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    files = {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    processes = min(session.config.getoption("--processes"), len(files))
    if torch.cuda.is_available():
        processes = 1
    options = session.config.option
    if processes < 2 or options.collectonly or options.usepdb or options.maxfail:
        return None  # pytest's own loop
    # Files of many tests first, so that all processes end at about the same time.
    queue = sorted(files.values(), key=len, reverse=True)
    run_in_processes(session, queue, processes)
    if session.testsfailed and not options.continue_on_collection_errors:
        raise session.Failed(f"{session.testsfailed} tests failed")
    return True


def run_in_processes(session, queue, processes):
    """Run lists of tests, and report what came of them."""
    context = multiprocessing.get_context("fork")
    taken = context.Value("i", 0)
    receivers = {}
    for _ in range(processes):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(session, queue, taken, sender))
        worker.start()
        sender.close()
        receivers[receiver] = worker
    hook = session.config.hook
    while receivers:
        for receiver in connection.wait(list(receivers)):
            try:
                message = receiver.recv()
            except EOFError:
                worker = receivers.pop(receiver)
                worker.join()
                if worker.exitcode:
                    raise pytest.UsageError(f"a process of tests died: {worker.exitcode}") from None
                continue
            report = hook.pytest_report_from_serializable(config=session.config, data=message)
            hook.pytest_runtest_logreport(report=report)


def work(session, queue, taken, sender):
    """One process: run tests until none is left, and send the report of each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    config = session.config
    config.pluginmanager.unregister(name="terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()  # into files of this process
    config.pluginmanager.register(Sender(config, sender))
    items = take_items(queue, taken)
    item = next(items, None)
    while item is not None:
        # What comes next says which fixtures stay.
        following = next(items, None)
        config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following
    sender.close()


def take_items(queue, taken):
    """The tests of the next list that no process has taken, then of another one."""
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(queue):
            return
        yield from queue[number]


class Sender:
    """Sends reports to the first process."""

    def __init__(self, config, sender):
        self.config = config
        self.sender = sender

    def pytest_runtest_logreport(self, report):
        hook = self.config.hook
        self.sender.send(hook.pytest_report_to_serializable(config=self.config, report=report))
