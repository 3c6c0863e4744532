"""Huge pages for the memory of a process that computes on CPU.

XLA for CPU asks for the temporaries of each step anew. With pages of 4 KiB the kernel then maps
hundreds of thousands of them a step; with pages of 2 MiB, which glibc asks for if it is told so
before a process starts, a few thousand.
"""

import os
import platform
import sys
from pathlib import Path

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def are_in_use() -> bool:
    """Returns whether glibc asks for huge pages in this process."""
    return f"{SETTING}=1" in os.environ.get(VARIABLE, "").split(":")


def start_again_with_them() -> None:
    """Replaces this process by the same command with huge pages, where these can be asked for.

    That is with glibc on Linux, if the kernel gives them to who asks (`madvise`) and the user has
    not chosen: `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps small pages. Call it before anything
    is loaded or opened.
    """
    tunables = os.environ.get(VARIABLE, "")
    if SETTING in tunables or not _can_be_asked_for():
        return
    chosen = ":".join(filter(None, [tunables, f"{SETTING}=1"]))
    command = [sys.executable, *sys.orig_argv[1:]]
    try:
        os.execve(sys.executable, command, {**os.environ, VARIABLE: chosen})
    except OSError:
        return  # slower, and no reason to fail


def _can_be_asked_for() -> bool:
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    try:
        return "[madvise]" in _KERNEL.read_text()
    except OSError:
        return False
