"""Turns a path or a repository id into a local folder, and explains why where it cannot."""

import difflib
import errno
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from jaxft.errors import ModelError, searched
from jaxft.hf.kinds import explain_other_kind, gguf_hint
from jaxft.hf.read import Entry

# Everything but weights of models: configs, tokenizers of every kind, chat templates, adapters.
_SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "tokenizer.tiktoken",
    "adapter_model.safetensors",
]
_WEIGHTS = ["model.safetensors", "model-*.safetensors"]
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token from {}/settings/tokens"


def resolve(path_or_repo_id: str, *, revision: str = "", weights: bool = True) -> Path:
    """Returns the local folder of a model, downloading a repository into the Hub's cache if needed.

    A folder that exists wins over a repository of the same name. With HF_HUB_OFFLINE=1 the cache
    alone is used.

    Args:
      path_or_repo_id: A folder, or `org/name` on the Hub.
      revision: Branch, tag or commit of a repository; empty is its default branch.
      weights: Whether the safetensors are needed too.

    Raises:
      ModelError: If there is no such folder or repository, or it is not available, with what to
        do; if a revision of a folder is asked for.
    """
    folder = Path(path_or_repo_id).expanduser()
    if folder.is_dir() and revision:
        raise ModelError(
            f"{folder} is a folder, which has no revision {revision!r}. Leave the revision out, or "
            "name a repository that is no folder here too."
        )
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.exists():
        raise ModelError(gguf_hint(str(folder.parent), folder.name))
    if folder.exists():
        raise ModelError(f"{folder} is a file; name the folder that holds it.")
    if _looks_local(path_or_repo_id):
        raise ModelError(
            f"{_no_folder(folder)}{searched(path_or_repo_id)} Give a folder that exists, or a "
            "repository id such as 'org/name'."
        )
    try:
        snapshot = Path(
            snapshot_download(
                path_or_repo_id,
                revision=revision or None,
                allow_patterns=_SMALL_FILES + (_WEIGHTS if weights else []),
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(_explain(error, path_or_repo_id, revision)) from error
    if weights and not any(snapshot.glob("*.safetensors")):
        raise ModelError(_no_safetensors(path_or_repo_id, revision))
    return snapshot


def found_anywhere(path: str) -> str:
    """Returns the absolute path of a folder, or a repository id as it is."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.exists() else path


def remote_tensors(repo: str, *, revision: str = "") -> dict[str, Entry]:
    """Returns the tensors of a repository from the headers of its files, without the weights.

    Raises:
      ModelError: If the Hub cannot be asked, or there are no weights in safetensors.
    """
    try:
        found = HfApi().get_safetensors_metadata(repo, revision=revision or None)
    except NotASafetensorsRepoError:
        raise ModelError(_no_safetensors(repo, revision)) from None
    except SafetensorsParsingError as error:
        raise ModelError(f"{repo} has a broken header: {error}.") from error
    except Exception as error:  # the client passes on the errors of the transport it uses
        raise ModelError(_explain(error, repo, revision)) from error
    return {
        name: Entry(Path(file), info.dtype, tuple(info.shape), *info.data_offsets)
        for file, content in found.files_metadata.items()
        for name, info in content.tensors.items()
    }


def lfs_hint(file: Path) -> str:
    """Returns what to do where a clone without Git LFS left a pointer, or an empty string."""
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        pointer = stream.read(40).startswith(b"version https://git-lfs")
    return " It is a pointer of Git LFS: run `git lfs pull` in the folder." if pointer else ""


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _no_folder(folder: Path) -> str:
    """Returns that a folder does not exist, and which ones beside it may be meant."""
    text, parent = f"There is no folder {folder}.", folder.parent
    if not parent.is_dir():
        return text if len(folder.parts) <= 2 else f"{text[:-1]}, nor {parent}."
    beside = sorted(path.name for path in parent.iterdir() if path.is_dir() and path.name[0] != ".")
    if near := difflib.get_close_matches(folder.name, beside, n=3, cutoff=0.6):
        return f"{text} Did you mean {' or '.join(str(parent / name) for name in near)}?"
    if len(folder.parts) == 1 or not beside:
        return text
    more = f" and {len(beside) - 5} more" if len(beside) > 5 else ""
    return f"{text} {parent} holds {', '.join(beside[:5])}{more}."


def _explain(error: Exception, repo: str, revision: str) -> str:
    page = f"{constants.ENDPOINT}/{repo}"
    log_in = _LOG_IN.format(constants.ENDPOINT)
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated. Accept its terms at {page}, then give your token: {log_in}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}. Its branches and tags: {page}/tree/main."
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"{repo} does not fit on the disk of {constants.HF_HUB_CACHE}; make room, try again."
    absent = _no_folder(Path(repo).expanduser())
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{absent} There is no repository {repo!r} either ({page}), or it is private. "
            f"Check the spelling; if it is private: {log_in}."
        )
    if isinstance(error, HFValidationError):
        return f"{absent} {repo!r} is no repository id such as 'org/name' either: {error}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{absent} As a repository, {repo} is not in the cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE is set, so it is not downloaded. Unset it, or run "
            f"`hf download {repo}` where there is a network."
        )
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
        return (
            f"{constants.ENDPOINT} refused access to {repo} ({cause.response.status_code}); the "
            f"token is not valid or may not read it: {log_in}."
        )
    reason = (str(cause) or repr(cause)).splitlines()[0]
    return (
        f"{absent} It is no repository in the cache either, and {constants.ENDPOINT} is out of "
        f"reach ({reason}). Check the network; a download that was cut off goes on."
    )


def _no_safetensors(repo: str, revision: str) -> str:
    try:
        files = HfApi().list_repo_files(repo, revision=revision or None)
    except (HfHubHTTPError, OSError) as error:
        return f"The cache {constants.HF_HUB_CACHE} holds no weights of {repo}: {error}."
    return explain_other_kind(repo, files) or (
        f"{repo} has no weights in safetensors; use a repository that has, or convert them."
    )
