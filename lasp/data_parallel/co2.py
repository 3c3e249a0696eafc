"""CO2: local steps, and an average over replicas that travels while the steps of the next round run.

For replicas that a slow network joins. A replica takes `sync_every` steps of its own optimizer, a round, and exchanges
nothing with the others. At its end the parameters are copied, and an all-reduce of the copies begins, which goes on
beside the next round and is consumed at the end of that. So the network has a whole round to carry the parameters once.

The rule (round t of all replicas begins at the same outer point x_t and ends at the replicas' own y_t):

    m     <- clip(momentum * m + (x_t - mean of y_{t-1}) / gap_penalty)
    x_t+1 <- x_t - outer_lr * m             where the next round begins

At the end of the first round nothing has arrived: x_1 is x_0, and what the first round has learned counts a round later
like all others. The rule is that of the released code of CO2 (arXiv 2401.16265), with a clip that clips; the paper's
formula for the staleness gap penalty was not to be found, so `gap_penalty` is a number or a function, and none of them
is called the paper's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lasp import arguments
from lasp.checks.agreement import checksum, compare, is_due
from lasp.checks.checksum import checksums
from lasp.checks.messages import check_messages
from lasp.checks.optimizers import free_gathered
from lasp.checks.replicas import compare_parameters
from lasp.checks.rounds import judge
from lasp.ranks import RankMismatchError, SequenceParallel, collectives, grad_group, replica_mesh, waiting
from lasp.ranks.group import making_groups, process
from lasp.ranks.mesh import connect_once

_NAMES = ("outer", "momentum", "average")  # of the tensors in a state_dict
_COUNTS = ("rounds", "local_steps", "on_the_way", "sent_lr")  # and of its numbers


@dataclass(frozen=True)
class Staleness:
    """What a `gap_penalty` that is a function is told, for one bucket of parameters."""

    round: int  # that has sent the average, from 0; the one that ends now is the next
    lr: float  # the inner learning rate of the last step, of the optimizer's first group
    sent_lr: float  # and when that round ended
    difference: Tensor  # [n] the outer point less the average: what momentum is about to get
    moved: Tensor  # [n] by how much the outer point has moved since that round began


class CO2:
    """Outer steps of replicas that train apart, of which each averages the parameters as they were a round ago.

        mesh = lasp.init_mesh(dp_replicate=2, sp=4)
        replica = lasp.replica_mesh(mesh)       # for all that belongs to a step: no gradient leaves the replica
        lasp.parallelize(model, replica["sp"])
        model = wrap_ddp(model, replica)        # or lasp.data_parallel(model, replica, ..), or a sync_grads each step
        co2 = lasp.CO2(model, optimizer, mesh, sync_every=48)
        ...
            optimizer.step()
            co2.step()                          # after every step of the optimizer
        co2.finish()                            # what is on its way is part of the model

    Of parameters that a replica's ranks hold whole, each rank keeps and sends a part only, and the replica gathers the
    new outer point: over the slow network goes one copy of the model a round, however many ranks a replica has.

    Memory beside the model and the inner optimizer: three numbers in fp32 (fp64 for parameters in fp64) for each
    parameter of this rank's part, which is 1 / (dp_shard x sp) of the model: the outer point, its momentum, and the
    copy that travels. For the moment of the outer step three buckets more.

    Between two ends of a round the replicas hold different weights, so no average over all ranks is taken meanwhile:
    with `check_finite` a replica looks at its own gradients only. Buffers are not averaged. `validate` of `parallelize`
    goes on to compare the ranks of a sequence.

    Args:
        model: as the replica trains it, after `wrap_ddp`, `wrap_fsdp2` or `lasp.data_parallel`; its trained parameters
            are averaged; one that is unfrozen or added later is an error at the end of the round (see `validate`).
        optimizer: the inner one, or several; of parameters of the model.
        mesh: the whole mesh, with the axis dp_replicate; or the axis, or a ProcessGroup, of replicas of one rank each;
            None for one replica, which takes the outer steps by itself and is told so by a warning.
        sync_every: local steps of a round.
        outer_lr: of the outer step.
        outer_momentum: from 0 to 1. With a number as `gap_penalty` the rule is outer SGD a round late, on what a round
            has changed, with momentum `outer_momentum - outer_lr / gap_penalty` (docs/co2.md): -0.5 by default. With 0
            even and odd rounds are two trainings that know nothing of each other.
        gap_penalty: what the difference to the stale average is divided by: a positive number, or a function that gets
            a `lasp.data_parallel.co2.Staleness` and returns a number, or a tensor [n] for the bucket's numbers. It
            must return the same on all replicas. The norm of a tensor in it would be that of a bucket's part.
        clip: the momentum is kept within [-clip, clip], number by number; None: it is not clipped.
        bucket_mb: MiB of parameters that travel in one all-reduce, at least one parameter.
        validate: "first" compares settings and weights of all replicas here. Then each round's average tells of which
            round its parts are (on a GPU, where the host would wait, it is read in the first two and every 1000th), and
            in the first two and every 1000th the outer points are compared, and at the end of each what is trained by
            then is what is averaged. "off" does not: what is unfrozen or added later each replica then keeps apart.

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication.
        RankMismatchError: replicas have other weights, parameters or settings; on every rank.
        PeerError: a rank did not come within the timeout of its group.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        mesh: DeviceMesh | ProcessGroup | None,
        *,
        sync_every: int,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.5,
        gap_penalty: float | Callable[[Staleness], float | Tensor] = 1.0,
        clip: float | None = None,
        bucket_mb: int = 32,
        validate: str = "first",
    ):
        self._model = arguments.module("model", model)
        free_gathered(model)
        parameters = _trained(model)
        self._optimizers = _optimizers(model, optimizer)
        self.sync_every = arguments.integer("sync_every", sync_every, at_least=1)
        self.outer_lr = arguments.number("outer_lr", outer_lr, positive=True)
        self.outer_momentum = arguments.number("outer_momentum", outer_momentum)
        if not 0 <= self.outer_momentum <= 1:
            raise ValueError(f"outer_momentum must be from 0 to 1, got {outer_momentum}")
        self.gap_penalty = gap_penalty
        if not callable(gap_penalty):
            self.gap_penalty = arguments.number("gap_penalty", gap_penalty, positive=True)
        self.clip = None if clip is None else arguments.number("clip", clip, positive=True)
        nbytes = arguments.integer("bucket_mb", bucket_mb, at_least=1) * 2**20
        arguments.choice("validate", validate, ("first", "off"))
        group, inside = _groups(mesh)
        _check_apart(model, parameters, group)

        self.rounds = 0  # that have ended
        self.local_steps = 0  # since then
        self._on_the_way: _Sent | None = None
        self._names = {p: name.removeprefix("module.") for name, p in parameters.items()}  # DDP's is no part of it
        self._replicas = SequenceParallel(group, name="CO2", validate=validate)
        self._inside = SequenceParallel(inside, name="CO2", validate=validate)
        self.replica, self.replicas = self._replicas.rank, self._replicas.size  # this one's number, and how many
        if self.replicas == 1:
            warnings.warn(
                "mesh has one replica (dp_replicate=1, or None), with which CO2 averages nothing and still takes outer "
                "steps, another training than without it: lasp.init_mesh(dp_replicate=2, ..) makes more",
                stacklevel=2,
            )
        if group is not None:
            self._replicas.peers.apart.add(self)
            compare_parameters(model, group, "CO2", validate=validate)
            connect_once(group, next(iter(parameters.values())).device.type)
        self._compare_settings(parameters)
        with torch.no_grad():
            self._buckets = [
                _Bucket(ps, self._inside if dealt else None) for dealt, ps in _cut(parameters.values(), nbytes)
            ]

    # What a user calls

    @torch.no_grad()
    def step(self) -> bool:
        """Count a local step; the last one of a round ends it. To be called on every rank after the optimizer's step.

        The host waits here, once a round and on gloo, for the average that was sent a round ago.

        Returns:
            Whether a round has ended: then the model is the new outer point, the same on all replicas.

        Raises:
            RankMismatchError: a replica sent the average of another round, or has another outer point.
            PeerError: a rank has ended, or did not come within the timeout of its group; nothing was changed.
            TypeError, ValueError: what `gap_penalty` returned is none.
            RuntimeError: a parameter is trained that was not when this was made.
        """
        self.local_steps += 1
        if self.local_steps < self.sync_every:
            return False
        self._end_round()
        return True

    @torch.no_grad()
    def finish(self) -> None:
        """End the round that is under way, if it has a step, and take the last average: the end of a training.

        Afterwards all replicas hold the same weights, and nothing is on its way. The host waits for the network.

        Raises: as `step`.
        """
        if self.local_steps:
            self._end_round()
        if self._on_the_way is not None:
            self._arrive()
            self._meet_inside()
            free_gathered(self._model)
            for bucket in self._buckets:
                self._outer_step(bucket)
                bucket.put(bucket.outer)
            self._on_the_way = None

    @contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Inside, the model has the weights at which this round began, the same on all replicas: for an evaluation.

        Needs memory for one more copy of the model. All ranks of a replica call it.
        """
        with torch.no_grad():
            self._meet_inside()
            own = [[x.clone() for x in map(_local, bucket.parameters)] for bucket in self._buckets]
            free_gathered(self._model)
            for bucket in self._buckets:
                bucket.put(bucket.outer)
        try:
            yield
        finally:
            with torch.no_grad():
                free_gathered(self._model)
                for bucket, kept in zip(self._buckets, own):
                    for p, x in zip(bucket.parameters, kept):
                        _local(p).copy_(x)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on in the middle of a round with the same bits; all ranks of a replica call it.

        "outer", "momentum" and "average" hold a tensor for each trained parameter by its name, the same on all replicas
        (DTensors of the replica's mesh where the parameters are), "rounds", "local_steps" and "sent_lr" numbers, and
        "on_the_way" says whether the average is one to be consumed. If it still travels, this waits for it. The weights
        of the model and the state of the inner optimizer are the replica's own: save those of every replica beside it.
        """
        self._arrive()
        self._meet_inside()
        found: dict[str, Any] = {name: {} for name in _NAMES}
        for bucket in self._buckets:
            for name in _NAMES:
                for p, x in zip(bucket.parameters, bucket.whole(getattr(bucket, name))):
                    found[name][self._names[p]] = _like(p, x.clone())
        sent = self._on_the_way
        values = (self.rounds, self.local_steps, sent is not None, 0.0 if sent is None else sent.lr)
        return found | dict(zip(_COUNTS, values))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, on as many ranks of the same layout.

        Load the model's weights and the inner optimizer's state, which are the replica's own, beside it.

        Raises:
            TypeError, ValueError: it does not fit this model or these settings, before anything is changed.
        """
        arguments.mapping("state", state)
        if set(state) != {*_NAMES, *_COUNTS}:
            raise ValueError(f"state must have {sorted({*_NAMES, *_COUNTS})}, got {arguments.shown(sorted(state))}")
        on_the_way = arguments.flag('state["on_the_way"]', state["on_the_way"])
        rounds = arguments.integer('state["rounds"]', state["rounds"], at_least=int(on_the_way))
        steps = arguments.integer('state["local_steps"]', state["local_steps"], at_least=0)
        if steps >= self.sync_every:
            raise ValueError(f'state["local_steps"] must be less than sync_every {self.sync_every}, got {steps}')
        sent = _Sent(rounds - 1, arguments.number('state["sent_lr"]', state["sent_lr"]))
        for name in _NAMES:
            self._check_tensors(name, state[name])
        self._arrive()  # what this object has sent itself
        for bucket in self._buckets:
            for name in _NAMES:
                found = [_local(state[name][self._names[p]]).to(p.device) for p in bucket.parameters]
                getattr(bucket, name).copy_(bucket.part(found))
        self.rounds, self.local_steps, self._on_the_way = rounds, steps, sent if on_the_way else None

    # The end of a round

    def _end_round(self) -> None:
        free_gathered(self._model)  # of a look at the loss
        for name, p in self._model.named_parameters() if self._replicas.validate == "first" else ():
            if p.requires_grad and p not in self._names:  # replicas would keep it apart for ever
                raise RuntimeError(
                    f"CO2 averages what was trained when it was made, and {name} was unfrozen or added since: call "
                    "finish() before that, and make it anew afterwards"
                )
        self._arrive()
        self._meet_inside()
        ends, stale = self.rounds, self._on_the_way
        sent = _Sent(ends, self._lr())
        sent.marks, sent.work = self._send_marks(ends)
        for number, bucket in enumerate(self._buckets):
            now = bucket.part([_local(p) for p in bucket.parameters])
            if stale is not None:
                self._outer_step(bucket)
            bucket.average.copy_(now)
            if self._replicas.size > 1 and bucket.average.numel():
                with waiting(f"CO2: sending bucket {number} of round {ends} to the other replicas"):
                    work = dist.all_reduce(bucket.average, group=self._replicas.group, async_op=True)
                sent.work.append(work)  # type: ignore[arg-type]  # there is one, as it is asynchronous
            bucket.put(bucket.outer)
        self._on_the_way, self.rounds, self.local_steps = sent, ends + 1, 0

    def _outer_step(self, bucket: _Bucket) -> None:
        """Take the outer step with an average that has arrived."""
        difference = bucket.outer - bucket.average
        penalty = self._penalty(bucket, difference) if callable(self.gap_penalty) else self.gap_penalty
        bucket.momentum.mul_(self.outer_momentum).add_(difference.div_(penalty))
        if self.clip is not None:
            bucket.momentum.clamp_(-self.clip, self.clip)
        bucket.outer.sub_(bucket.momentum, alpha=self.outer_lr)

    def _penalty(self, bucket: _Bucket, difference: Tensor) -> float | Tensor:
        stale = self._on_the_way
        assert stale is not None
        moved = bucket.momentum * -self.outer_lr  # the last outer step was the only one since
        found = self.gap_penalty(Staleness(stale.round, self._lr(), stale.lr, difference, moved))  # type: ignore[operator]
        if not isinstance(found, Tensor):
            return arguments.number("what gap_penalty returns", found, positive=True)
        if found.shape != difference.shape:
            raise ValueError(
                f"what gap_penalty returns must be a number or of shape {tuple(difference.shape)}, "
                f"got {arguments.shown(found)}"
            )
        return found

    def _lr(self) -> float:
        """Of a learning rate on a device the host would have to wait, and only a function may need it."""
        lr = self._optimizers[0].param_groups[0]["lr"]
        return float(lr) if callable(self.gap_penalty) or not isinstance(lr, Tensor) else 0.0

    def _arrive(self) -> None:
        """Wait until the average that is on its way is there, on the host or for the stream; once for each."""
        sent = self._on_the_way
        if sent is None or not sent.work:
            return
        for number, work in enumerate(sent.work):
            what = "which round each replica has sent" if number == 0 else f"bucket {number - 1}"
            with waiting(f"CO2: the average of round {sent.round} over {self._replicas.size} replicas ({what})"):
                self._replicas.peers.wait(work)
        self._check_marks(sent)
        for bucket in self._buckets:
            bucket.average.div_(self._replicas.size)
        sent.work = []

    # What ranks compare

    def _meet_inside(self) -> None:
        """The ranks of a replica, before they gather a new outer point."""
        if self._inside.size > 1:
            kind = (("numbers", sum(bucket.outer.numel() for bucket in self._buckets if bucket.inside is not None)),)
            facts = (("rounds", self.rounds), ("local steps", self.local_steps))
            device = self._buckets[0].outer.device
            check_messages(self._inside, "the outer point", kind, device, facts=facts, where="CO2")

    def _compare_settings(self, parameters: Mapping[str, Tensor]) -> None:
        """Compare the settings of all replicas, and of the ranks of each; once."""
        penalty = "a function" if callable(self.gap_penalty) else self.gap_penalty
        fields = {
            "sync_every": self.sync_every,
            "outer_lr": self.outer_lr,
            "outer_momentum": self.outer_momentum,
            "gap_penalty": penalty,
            "clip": self.clip,
        }
        for ranks in (self._inside, self._replicas):
            if ranks.size > 1 and ranks.validate == "first":
                alike = ranks is self._replicas
                weights = {"first weight": checksums({name: _local(p) for name, p in parameters.items()})}
                compare(ranks, fields, weights if alike else {}, before="CO2")

    def _send_marks(self, ends: int) -> tuple[Tensor | None, list[dist.Work]]:
        """A row for each replica with what it sends: the sum of zeros and one row is that row, on all replicas."""
        ranks = self._replicas
        if ranks.size == 1:
            return None, []
        marks = torch.zeros(ranks.size, 3, dtype=torch.int64, device=collectives.device_of(ranks.group))  # type: ignore[arg-type]
        point = 0
        if ranks.validate == "first" and is_due(ends):
            point = int(checksum(checksums({str(i): b.outer for i, b in enumerate(self._buckets)}).items()), 16)
        marks[ranks.peers.rank] = torch.tensor([ends, self.local_steps, point])
        with waiting(f"CO2: sending the mark of round {ends} to the other replicas"):
            work = dist.all_reduce(marks, group=ranks.group, async_op=True)
        return marks, [work]  # type: ignore[list-item]

    def _check_marks(self, sent: _Sent) -> None:
        """Raise on every replica unless all of them have sent the same round."""
        ranks = self._replicas
        if sent.marks is None or ranks.validate == "off" or not (sent.marks.device.type == "cpu" or is_due(sent.round)):
            return
        with waiting(f"CO2: which round each replica has sent (of round {sent.round})"):
            rows = sent.marks.tolist()
        records = {}
        for rank, (ends, steps, point) in enumerate(rows):
            fields = {"round": str(ends), "local steps": str(steps), "outer point": f"checksum {point:08x}"}
            records[ranks.name_of(rank)] = {"fields": fields}
        verdict = judge(records)
        if verdict["found"] == "mismatch":
            raise RankMismatchError(
                f"CO2: replicas have sent different things to one average: {verdict['text']}; all ranks of all "
                "replicas call step() after every step of the optimizer, and load the same checkpoint"
            )

    def _check_tensors(self, name: str, found: Any) -> None:
        arguments.mapping(f'state["{name}"]', found)
        expected = {self._names[p]: p for bucket in self._buckets for p in bucket.parameters}
        if odd := sorted(set(found) ^ set(expected)):
            raise ValueError(f'state["{name}"] and the trained parameters differ in {arguments.shown(odd[:4])}')
        for parameter, p in expected.items():
            x = arguments.tensor(f'state["{name}"]["{parameter}"]', found[parameter])
            dtype = _wide(p)
            alike = isinstance(x, DTensor) == isinstance(p, DTensor) and _local(x).shape == _local(p).shape
            if x.shape != p.shape or x.dtype != dtype or not alike:
                raise ValueError(
                    f'state["{name}"]["{parameter}"] must be {"a DTensor " if isinstance(p, DTensor) else ""}'
                    f"{tuple(p.shape)} of {dtype}, got {arguments.shown(x)}"
                )


class _Sent:
    """What is on its way: of which round, and what to wait for; no work once it has arrived."""

    def __init__(self, round_: int, lr: float):
        self.round, self.lr = round_, lr
        self.marks: Tensor | None = None
        self.work: list[dist.Work] = []


class _Bucket:
    """Some parameters of one dtype and device, end to end; of what they are this rank holds its part.

    `outer`, `momentum` and `average` [n] are memory of their own: what travels is never what is trained.
    """

    def __init__(self, parameters: list[nn.Parameter], inside: SequenceParallel | None):
        """`inside`: the ranks that all hold these parameters whole, and share the work; None: this rank alone."""
        self.parameters, self.inside = parameters, inside if inside is not None and inside.size > 1 else None
        self._counts = [_local(p).numel() for p in parameters]
        self._parts = 1 if self.inside is None else self.inside.size
        self._mine = 0 if self.inside is None else self.inside.peers.rank
        self.outer = self.part([_local(p) for p in parameters]).clone()
        self.momentum = torch.zeros_like(self.outer)
        self.average = torch.zeros_like(self.outer)  # while it travels, the sum

    def part(self, tensors: list[Tensor]) -> Tensor:
        """This rank's part of tensors of the parameters' shapes, in the dtype of the outer point."""
        flat = torch.cat([x.flatten() for x in tensors]).to(_wide(self.parameters[0]))
        padding = -flat.numel() % self._parts
        if padding:
            flat = torch.cat([flat, flat.new_zeros(padding)])
        return flat.view(self._parts, flat.numel() // self._parts)[self._mine]

    def whole(self, part: Tensor) -> list[Tensor]:
        """A tensor of each parameter's (local) shape, of the parts of all ranks."""
        flat = part
        if self.inside is not None:
            flat = part.new_empty(self._parts * part.numel())
            with waiting("CO2: gathering the outer point of the replica"):
                collectives.gather_flat(flat, part, group=self.inside.group)
        pieces = flat[: sum(self._counts)].split(self._counts)
        return [x.view(_local(p).shape) for x, p in zip(pieces, self.parameters)]

    def put(self, part: Tensor) -> None:
        """Write the outer point into the parameters, in their dtype."""
        for p, x in zip(self.parameters, self.whole(part.to(self.parameters[0].dtype))):
            _local(p).copy_(x)


def _local(p: Tensor) -> Tensor:
    """What of a parameter lies on this rank, the same memory."""
    return p.to_local() if isinstance(p, DTensor) else p.detach()


def _like(p: Tensor, x: Tensor) -> Tensor:
    """x, which lies on this rank, as a tensor of the parameter's shape."""
    if not isinstance(p, DTensor):
        return x
    return DTensor.from_local(x, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _wide(p: Tensor) -> torch.dtype:
    """The dtype in which the outer point is kept: 16 bits would lose what a round adds."""
    return torch.promote_types(p.dtype, torch.float32)


def _cut(parameters: Iterator[nn.Parameter] | Any, nbytes: int) -> Iterator[tuple[bool, list[nn.Parameter]]]:
    """Buckets, in the order of the parameters, and whether the ranks of a replica deal each out among them."""
    kinds: dict[tuple[bool, torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((not isinstance(p, DTensor), p.dtype, p.device), []).append(p)
    for (dealt, dtype, _), those in kinds.items():
        bucket, held = [], 0
        for p in those:
            size = _local(p).numel() * dtype.itemsize
            if bucket and held + size > nbytes:
                yield dealt, bucket
                bucket, held = [], 0
            bucket.append(p)
            held += size
        yield dealt, bucket


# Arguments


def _optimizers(model: nn.Module, optimizer: Any) -> list[Optimizer]:
    found = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for x in found:
        if not hasattr(x, "param_groups"):  # an optimizer need not derive from PyTorch's
            raise TypeError(f"optimizer must be an optimizer of torch.optim or several, got {arguments.shown(x)}")
    held, own = [p for x in found for group in x.param_groups for p in group["params"]], set(model.parameters())
    strange = next((p for p in held if p not in own), None)
    if strange is not None or not held:
        got = f"one of a parameter {tuple(strange.shape)} that is not its own" if strange is not None else "none of any"
        raise ValueError(
            f"optimizer must be of parameters of the model, got {got}; make it after wrap_fsdp2, which replaces them"
        )
    return found


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"model must have a parameter that is trained, got {arguments.shown(type(model).__name__)}")
    for name, p in found.items():
        if is_lazy(p) or p.is_meta:
            raise ValueError(f"model must have its weights, but {name} has no memory yet")
        if not p.is_floating_point():
            raise ValueError(f"model must have real weights, but {name} is {p.dtype}")
    return found


def _groups(mesh: DeviceMesh | ProcessGroup | None) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """The replicas of this rank's part, and the ranks of this replica; None for one rank."""
    if mesh is None or isinstance(mesh, ProcessGroup) or (isinstance(mesh, DeviceMesh) and mesh.ndim == 1):
        return SequenceParallel(mesh).group, None
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, a ProcessGroup or None, got {arguments.shown(mesh)}")
    if "dp_replicate" not in (mesh.mesh_dim_names or ()):
        raise ValueError(f'mesh must have the axis "dp_replicate", got {mesh.mesh_dim_names}')
    with making_groups("CO2: making the process group of a replica"):
        inside, _ = grad_group(replica_mesh(mesh))
    return mesh["dp_replicate"].get_group(), inside


def _check_apart(model: nn.Module, parameters: Mapping[str, Tensor], group: ProcessGroup | None) -> None:
    """Raise if gradients are averaged over replicas anyway, at every step."""
    others = set() if group is None else {*dist.get_process_group_ranks(group)} - {dist.get_rank()}
    how = "must be averaged within a replica only: give the scheme, such as wrap_ddp, lasp.replica_mesh(mesh)"
    for name, p in parameters.items():
        if isinstance(p, DTensor) and others & set(p.device_mesh.mesh.flatten().tolist()):
            raise ValueError(f"model {how}; {name} lies on ranks of other replicas")
    for module in model.modules():
        averages = module if isinstance(module, DistributedDataParallel) else process.reducers.get(module)
        averaged_over = getattr(averages, "process_group", None)  # DDP's reducer, of the module inside, tells none
        if averaged_over is not None and others & set(dist.get_process_group_ranks(averaged_over)):
            raise ValueError(f"model {how}; its {type(averages).__name__} is over other replicas, too")
