"""The one exception tree of the project; every class carries one message and pickles.

MMRLError
├── ConfigError            what the user wrote: a key, a type, a combination
├── DataError              a dataset, a row or an image
│   ├── ImageError             one image is broken or refused
│   ├── QuarantineError        too many broken samples in a run
│   └── PreferenceError        a preference that cannot be stored
│       ├── ConflictError          the same rater said otherwise before
│       ├── UnknownPairError       no pair of that id
│       └── PreferenceStoreError   the store is out of reach
├── ModelError             a checkpoint, a processor, an adapter
│   ├── AdapterError           LoRA targets, shapes, foreign adapters
│   └── ContextLengthError     prompt plus completion exceed the model's context
├── RewardError            a reward raised, timed out, or returned NaN or too few
├── RolloutError           the pool of rollout workers cannot go on
│   └── PlacementError         an actor was not placed in time
├── LearnerError           the learner group cannot go on
│   ├── NonFiniteError         loss or gradient norm is NaN or infinite
│   └── BlindPolicyError       the policy does not look at its pictures
├── RunError               a run folder: exists, missing, not resumable
│   ├── CheckpointError        no valid checkpoint, or a broken one was asked for
│   └── RaySessionError        a Ray that does not start, or cannot be joined
├── TrackerError           a tracker cannot be used: not installed, no key, no network
├── ExportError            an export that is not what its run is, or does not arrive
├── JobError               a job on a cluster: not taken, not to be had
│   ├── UnknownJobError        no job of that id
│   ├── UnknownFileError       no result file of that id
│   ├── JobServerError         the job server is out of reach
│   └── JobSetupError          the job server takes no job as it was set up
├── ServingError           the served model, its gateway or a client of it
│   ├── UnknownModelError      no model or adapter of that id
│   ├── UnknownImageError      no picture of that hash
│   ├── OverloadedError        a queue or a limit is full: try again later
│   └── AccessError            no key, a wrong one, or one without the role
├── ProcessError           a process beside this one does not start, or is lost
└── Interrupted            the user stopped the run
"""

import importlib
import traceback
from collections.abc import Callable


class MMRLError(Exception):
    """Root of the tree. The message names the thing, the value and the remedy, in one line."""


class ConfigError(MMRLError):
    """What the user wrote is wrong: an unknown key, a wrong type, an impossible combination."""


class DataError(MMRLError):
    """A dataset, one of its rows or one of its files cannot be used."""


class ImageError(DataError):
    """One image is broken, too large, or of a format that is not allowed."""


class QuarantineError(DataError):
    """More samples were quarantined than the run's budget allows."""


class PreferenceError(DataError):
    """A preference cannot be stored: equal captions, an unknown picture, a rating off the scale."""


class ConflictError(PreferenceError):
    """The same rater has said something else about the same pair before."""


class UnknownPairError(PreferenceError):
    """The store of preferences has no pair of that id."""


class PreferenceStoreError(PreferenceError):
    """The store of preferences is out of reach, or is none."""


class ModelError(MMRLError):
    """A model folder, its processor or its chat template cannot be used."""


class AdapterError(ModelError):
    """An adapter's targets, shapes or base do not fit the model."""


class ContextLengthError(ModelError):
    """A prompt and its longest completion do not fit the model's context."""


class RewardError(MMRLError):
    """A reward raised, timed out, or returned NaN or the wrong number of scores."""


class RolloutError(MMRLError):
    """The pool of rollout workers cannot go on."""


class PlacementError(RolloutError):
    """An actor was not placed within its deadline; the message names the resources it asked for."""


class LearnerError(MMRLError):
    """The learner group cannot go on."""


class NonFiniteError(LearnerError):
    """A loss or a gradient norm is NaN or infinite; the message names step, metric and samples."""


class BlindPolicyError(LearnerError):
    """The policy does not look at its pictures, and the run was told to stop then; its checkpoints are kept."""


class RunError(MMRLError):
    """A run folder exists already, is missing, or cannot be resumed."""


class CheckpointError(RunError):
    """A checkpoint is missing, truncated or fails its hashes."""


class RaySessionError(RunError):
    """A local Ray does not start, or a cluster cannot be joined."""


class TrackerError(MMRLError):
    """A tracker cannot be used as things are; the message says what to do about it."""


class ExportError(MMRLError):
    """What was exported differs from the run's policy, cannot be made of this run, or cannot be delivered."""


class JobError(MMRLError):
    """A job on a cluster cannot be submitted, found, followed or stopped."""


class UnknownJobError(JobError):
    """The cluster knows no job of that id."""


class UnknownFileError(JobError):
    """No job has a result file of that id."""


class JobSetupError(JobError):
    """The cluster's job server takes no job until whoever runs it has changed something."""


class JobServerError(JobError):
    """The cluster's job server is out of reach, or cannot do it now; it may be another time."""


class ServingError(MMRLError):
    """The served model, its gateway or a client of it failed."""


class UnknownModelError(ServingError):
    """No model or adapter of that id is served."""


class UnknownImageError(ServingError):
    """No picture of that hash is known here; send the picture itself."""


class OverloadedError(ServingError):
    """A queue or a limit is full; the same request may succeed later."""


class AccessError(ServingError):
    """No key, a wrong or revoked one, or one whose role does not allow this."""


class ProcessError(MMRLError):
    """A process that works for this one cannot be started, or ended without an answer."""


class Interrupted(MMRLError):
    """The user asked the run to stop."""


def first_line(error: BaseException) -> str:
    """`Kind: message` of another library's error, of a message of several lines the first, to stand in one of ours."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def said(error: BaseException) -> str:
    """The first line of such an error's message; its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """The whole of such an error's message, as one line."""
    return " ".join(str(error).split())


def raised_at(error: BaseException, *, without: Callable[[str], bool] = lambda file: False) -> str:
    """` (file:line)` of the last call that it came through, files `without` and the machinery of imports left out.

    Empty where nothing is left.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != importlib.__file__
        and not frame.filename.startswith("<frozen importlib")
        and not without(frame.filename)
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def last_line(text: str, most: int = 500) -> str:
    """Of a traceback what was raised, at most so many characters; empty where there is nothing."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:most]
