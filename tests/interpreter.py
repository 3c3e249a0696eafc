"""Triton's interpreter for this process, where there is no GPU: imported before anything that imports Triton.

It computes what it computes without this file, to the bit (tests/test_kernels.py compares): this leaves out what it
repeats for each launch, each call and each value, two thirds of its time.
"""

import os
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch

CUDA = torch.cuda.is_available()
_own = []  # what stood in Triton before: of which object, under which name
_put_in = []  # what its interpreter has put into its language, in order: likewise, what was there before, and what is


def _put(owner, name, value):
    _own.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


@contextmanager
def as_it_comes():
    """Triton's interpreter without what this file changes, and its language as it is between launches."""
    from triton.runtime.interpreter import _MISSING

    with ExitStack() as stack:
        for owner, name, value in _own:
            stack.enter_context(mock.patch.object(owner, name, value))
        for owner, name, before, _ in reversed(_put_in):
            setattr(owner, name, before) if before is not _MISSING else delattr(owner, name)
        try:
            yield
        finally:
            for owner, name, _, now in _put_in:
                setattr(owner, name, now)


def _quicken():
    from triton import language as tl
    from triton.runtime import interpreter

    # At each launch, and at each call of a device function, it puts functions of its own into Triton's language, and
    # takes them out behind the launch. Nothing is compiled in this process: they stay.
    put_in, scopes = interpreter._patch_lang, {}

    def put_in_once(fn):
        languages = frozenset(name for name, value in fn.__globals__.items() if value is tl or value is tl.core)
        if languages not in scopes:
            scopes[languages] = put_in(fn)
            changes = scopes[languages]._changes
            _put_in.extend((owner, name, before, vars(owner)[name]) for owner, name, before in changes)
            changes.clear()  # that it would take out
        return scopes[languages]

    _put(interpreter, "_patch_lang", put_in_once)

    # Six operations for each on integers, to see if it overflows. What they find it looks at with TRITON_DEBUG only.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        _put(builder, "options", replace(builder.options, sanitize_overflow=False))

    # A dictionary of all types each time that one is looked up.
    look_up, found = interpreter._get_np_dtype, {}

    def look_up_once(dtype):
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    _put(interpreter, "_get_np_dtype", look_up_once)

    # For each value a check of its shape, and constants of the language that are the same for all values of a type.
    make_type, types = tl.block_type.__init__, {}

    def make_type_once(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = types[key]

    _put(tl.block_type, "__init__", make_type_once)
    make_value, sizes = tl.tensor.__init__, {}

    def make_value_once(self, handle, type):
        if type.name not in sizes:
            make_value(self, handle, type)
            sizes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes[type.name]

    _put(tl.tensor, "__init__", make_value_once)


def forget_plans():
    """What was worked out from `lasp_kernels.plan.CONFIGS`, for a test that changes it."""
    from lasp_kernels import plan, shared

    for kept in (shared.shared_by, plan.walk_blocks):
        kept.cache_clear()


if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    _quicken()
