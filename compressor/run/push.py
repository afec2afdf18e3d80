"""Upload a folder that compressor has written to a hub, and hold what the hub then has against it."""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.engine.hub import CHECKSUMS, has_xet, sha256_of, without_xet
from compressor.engine.hub_errors import translated
from compressor.engine.hub_names import HUB_ID, HubName
from compressor.engine.output import OURS
from compressor.errors import UserError
from compressor.report.card_front import front_matter_of
from compressor.run.push_checks import Checked, Paths, Piece, check_folder, checksums

CARD = "README.md"
LOAD = "## Load\n\n"
NOT_OURS = frozenset({".gitattributes"})
"""Files that a hub puts into a repository itself."""

FILE = re.compile(r"(?<=[ \"'])PATH/(?=\w)")
MLX = "mlx_lm.generate --model PATH"

LARGEST = 50 * 10**9
"""Bytes of the largest file that is uploaded, and downloaded, without Xet."""


@dataclass(frozen=True)
class Wanted:
    """How to upload.

    Attributes:
        private: make a new repository that only its owner sees.
        revision: branch to upload to, made where there is none; or ``refs/pr/N``, a pull request.
        create_pr: propose it as a pull request instead of writing to the main branch.
        endpoint: URL of the hub; None: HF_ENDPOINT, or huggingface.co.
        overwrite: replace what compressor has uploaded there before.
        paths: see `check_folder`.
        message: of the commit.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    endpoint: str | None = None
    overwrite: bool = False
    paths: Paths = "refuse"
    message: str | None = None


@dataclass(frozen=True)
class Prepared:
    """What would be uploaded where, with everything checked.

    Attributes:
        sums: file name -> SHA-256 of the weights.
        stale: files there that are not in the folder, and go.
        new: whether the repository must be made.
        branch: whether the branch must be made.
        done: whether the hub holds all of it already.
    """

    model: HubName
    endpoint: str
    token: str
    checked: Checked
    pieces: tuple[Piece, ...]
    sums: dict[str, str]
    stale: tuple[str, ...]
    new: bool
    branch: bool
    done: bool

    @property
    def url(self) -> str:
        """Where people see it."""
        tree = f"/tree/{self.model.revision}" if self.model.revision else ""
        return f"{self.endpoint}/{self.model.id}{tree}"

    @property
    def doubts(self) -> list[str]:
        """What its owner may want to mend first."""
        report, card = self.checked.report, next((piece.text for piece in self.pieces if piece.name == CARD), None)
        found = []
        if report.exported is not None and not report.runtimes:
            found.append("no program has loaded it yet")
        if report.verification is None and report.exported is None:
            found.append("nobody has checked that it loads: its run was told not to (--no-verify)")
        found += [f"{way.name} computes something else: {way.check}" for way in report.runtimes if not way.passed]
        if card is None:
            found.append(f"it has no {CARD}")
        elif "license" not in front_matter_of(card):
            found.append(f"the card names no licence: add `license: ...` at the head of {CARD}")
        return found


@dataclass(frozen=True)
class Pushed:
    """What is there now: its address and commit; whether anything had to be uploaded, and is a proposal only."""

    url: str
    commit: str
    uploaded: bool
    proposed: bool = False


def prepare(folder: Path, name: str, wanted: Wanted) -> Prepared:
    """Check everything that can be checked without writing to the hub.

    Args:
        folder: that compressor has written.
        name: ``org/name`` of the repository.
        wanted: how to upload.

    Returns:
        What `push` takes: ``pieces`` to upload, their ``sums``, ``url``, and in ``doubts`` what may want mending first.

    Raises:
        UserError: a bad name, flags that contradict each other, a folder that must not be uploaded (see
            `check_folder`), no token or one that may not write, a repository that holds something else, or a hub that
            cannot be reached.
    """
    model = _named(name, wanted)
    checked = check_folder(folder, paths=wanted.paths)
    endpoint, token = _endpoint_and_token(wanted.endpoint)
    with translated(model, endpoint, doing="push"):
        from huggingface_hub import HfApi

        api = HfApi(endpoint=endpoint, token=token)
        _check_rights(api.whoami(), model, endpoint, wanted)
        found = _info(api, model.id)
        if found is None and wanted.create_pr:
            raise UserError(f"{endpoint} has no model {model.id!r} to propose a change to", fix="leave --create-pr out")
        if found is not None and wanted.private and not found.private:
            raise UserError(
                f"{model.id} is there already, and public", fix="make it private on the hub, or choose another name"
            )
        there, branch = ({}, model.revision is not None) if found is None else _there(api, model, found.sha)
    sums = checksums(checked)
    pieces = _pieces(checked, model, sums)
    stale = tuple(sorted(there.keys() - {piece.name for piece in pieces} - NOT_OURS))
    ours = found is None or branch or wanted.create_pr or (model.revision or "").startswith("refs/pr/")
    differs = [piece.name for piece in pieces if piece.name in there and not _equal(piece, there[piece.name], sums)]
    if not ours and (stale or differs):
        _check_clash(there, [*stale, *differs], model, overwrite=wanted.overwrite)
    done = found is not None and not stale and not differs and all(piece.name in there for piece in pieces)
    return Prepared(
        model, endpoint, token, checked, pieces, sums, stale, new=found is None, branch=branch, done=done and not branch
    )


def push(prepared: Prepared, wanted: Wanted) -> Pushed:
    """Upload, compare, and say where it is. What an interrupted call has uploaded is not uploaded again.

    Args:
        prepared: by `prepare`.
        wanted: the same.

    Raises:
        UserError: the upload broke off, or the hub holds other bytes afterwards.
    """
    model, endpoint = prepared.model, prepared.endpoint
    with translated(model, endpoint, doing="push"):
        from huggingface_hub import HfApi

        api = HfApi(endpoint=endpoint, token=prepared.token)
        if prepared.done:
            return Pushed(prepared.url, str(_info(api, model.id, model.revision).sha), uploaded=False)
        if prepared.new:
            api.create_repo(model.id, private=wanted.private or None, exist_ok=True)
        if prepared.branch and model.revision is not None:
            api.create_branch(model.id, branch=model.revision, exist_ok=True)
        info = _upload(api, prepared, wanted)
        there = _listing(api, model.id, info.oid)
    _compare(prepared, there)
    return Pushed(info.pr_url or prepared.url, info.oid, uploaded=True, proposed=info.pr_url is not None)


def load_command(prepared: Prepared) -> str | None:
    """How to load it, as the run has checked it; None where it was not."""
    way = next((entry for entry in prepared.checked.report.runtimes if entry.passed), None)
    if way is None:
        return None
    first = f"# after {_fetch(prepared.model)}\n" if _needs_files(way.command, prepared.model) else ""
    return first + placed(way.command, prepared.model)


def placed(text: str, model: HubName) -> str:
    """A text in which ``PATH`` stands for the model, with the model's name there.

    Where a file of it is named, or a program is told that takes no revisions, it is the folder that `_fetch` makes.
    """
    folder = _folder(model)
    revision = f', revision="{model.revision}"' if model.revision else ""
    text = text.replace('from_pretrained("PATH"', f'from_pretrained("{model.id}"{revision}')
    text = FILE.sub(f"{folder}/", text)
    if model.revision is not None:
        text = text.replace(MLX, MLX.replace("PATH", folder))
    return re.sub(r"(?<=[ \"'])PATH(?=[ \"'`\n]|$)", str(model), text)


def _needs_files(text: str, model: HubName) -> bool:
    """Whether a command in ``text`` reads files that must have been fetched."""
    return FILE.search(text) is not None or (model.revision is not None and MLX in text)


def _folder(model: HubName) -> str:
    return model.id.split("/")[1]


def _fetch(model: HubName) -> str:
    revision = f" --revision {model.revision}" if model.revision else ""
    return f"hf download {model.id}{revision} --local-dir {_folder(model)}"


def _named(name: str, wanted: Wanted) -> HubName:
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{name!r} is no name on a hub", fix="namespace/name, such as your user name and a name")
    if wanted.create_pr and wanted.revision is not None:
        raise UserError("--create-pr proposes a change to the main branch", fix="leave --revision or --create-pr out")
    return HubName(name, None if wanted.revision == "main" else wanted.revision)


def _endpoint_and_token(asked: str | None) -> tuple[str, str]:
    from huggingface_hub import constants, get_token

    endpoint = (asked or constants.ENDPOINT).rstrip("/")
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
        raise UserError(f"{endpoint!r} is no address of a hub", fix="--endpoint https://HOST")
    if constants.is_offline_mode():
        raise UserError("nothing can be uploaded: HF_HUB_OFFLINE is set", fix="unset HF_HUB_OFFLINE")
    token = get_token()
    if token is None:
        raise UserError("there is no token to upload with", fix="set HF_TOKEN, or run `hf auth login`")
    return endpoint, token


def _check_rights(who: Mapping[str, Any], model: HubName, endpoint: str, wanted: Wanted) -> None:
    """Refuse a token that only reads, and a namespace that is not the user's. Others are for the hub to judge."""
    user = str(who.get("name"))
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError(
            f"the token of {user} may only read", fix=f"make one that may write, at {endpoint}/settings/tokens"
        )
    spaces = [user, *(str(org.get("name")) for org in who.get("orgs") or [])]
    namespace = model.id.split("/")[0]
    if not wanted.create_pr and namespace.lower() not in {space.lower() for space in spaces}:
        raise UserError(
            f"{user} may not write to {namespace!r} (may to: {', '.join(spaces)})",
            fix="choose another namespace, or --create-pr to propose it to the owner of an existing model",
        )


def _info(api: Any, name: str, revision: str | None = None) -> Any:
    """What the hub knows of a model; None where it has none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(name, revision=revision)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _there(api: Any, model: HubName, main: str) -> tuple[dict[str, Any], bool]:
    """The files on the branch, and whether the branch is yet to be made, or has nothing of its own."""
    from huggingface_hub.errors import RevisionNotFoundError

    if model.revision is None:
        return _listing(api, model.id, None), False
    try:
        head = api.model_info(model.id, revision=model.revision).sha
    except RevisionNotFoundError:
        if model.revision.startswith("refs/"):
            raise
        head = main
    return _listing(api, model.id, head), head == main


def _listing(api: Any, name: str, revision: str | None) -> dict[str, Any]:
    """Path -> file of a repository."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(name, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _check_clash(there: Mapping[str, Any], others: Sequence[str], model: HubName, *, overwrite: bool) -> None:
    """Refuse to write over what is not an interrupted upload of the same folder."""
    if OURS not in there:
        raise UserError(
            f"{model} is there already, and was not written by compressor (it holds {others[0]})",
            fix="choose another name, --revision BRANCH, or --create-pr",
        )
    if not overwrite:
        raise UserError(
            f"{model} holds another upload of compressor ({others[0]} differs)",
            fix="--overwrite replaces it (the old one stays in its history), --revision BRANCH puts it beside it",
        )


def _pieces(checked: Checked, model: HubName, sums: Mapping[str, str]) -> tuple[Piece, ...]:
    """The files to upload: the card names the model, and checksums come along."""
    listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    pieces = []
    for piece in checked.pieces:
        if piece.name == CARD:
            text = piece.text if piece.text is not None else piece.file.read_text(encoding="utf-8")
            if _needs_files(text, model):
                fetch = f"Commands that name files here want them fetched first:\n\n```sh\n{_fetch(model)}\n```\n\n"
                text = text.replace(LOAD, LOAD + fetch, 1)
            piece = Piece(piece.name, piece.file, f"{placed(text, model).rstrip()}\n\n{_checksum_words(listed)}")
        if piece.name != CHECKSUMS:
            pieces.append(piece)
    return (*pieces, Piece(CHECKSUMS, checked.folder / CHECKSUMS, listed))


def _checksum_words(listed: str) -> str:
    return (
        "## Checksums\n\nSHA-256 of the weight files, as in "
        f"`{CHECKSUMS}` (`sha256sum -c {CHECKSUMS}` compares them):\n\n```\n{listed}```\n"
    )


def _equal(piece: Piece, there: Any, sums: Mapping[str, str]) -> bool:
    """Whether the hub's file has the bytes of ours: by SHA-256 where it is a large one, else by git's hash."""
    from huggingface_hub.utils.sha import git_hash

    if piece.size != there.size:
        return False
    if there.lfs is not None:
        known = sums.get(piece.name)
        return bool(there.lfs.sha256 == (known or sha256_of(piece.file)))
    data = piece.file.read_bytes() if piece.text is None else piece.text.encode()
    return bool(there.blob_id == git_hash(data))


def _upload(api: Any, prepared: Prepared, wanted: Wanted) -> Any:
    """Upload from a folder of links, which holds what was checked and nothing else."""
    model = prepared.model
    xet = has_xet(model, prepared.endpoint, prepared.token, pull_request=wanted.create_pr)
    if not xet and (large := max(prepared.pieces, key=lambda piece: piece.size)).size > LARGEST:
        raise UserError(f"{large.name} is larger than a hub without Xet takes (50 GB)", fix="push to another hub")
    with tempfile.TemporaryDirectory(prefix="compressor-push-") as scratch:
        for piece in prepared.pieces:
            target = Path(scratch) / piece.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if piece.text is None:
                target.symlink_to(piece.file)
            else:
                target.write_bytes(piece.text.encode())
        arguments: dict[str, Any] = {
            "repo_id": model.id,
            "folder_path": scratch,
            "revision": model.revision,
            "create_pr": wanted.create_pr,
            "commit_message": wanted.message or f"{prepared.checked.folder.name}, by compressor",
            "delete_patterns": [glob.escape(name) for name in prepared.stale] or None,
        }
        if xet:
            return api.upload_folder(**arguments)
        with without_xet():
            return api.upload_folder(**arguments)


def _compare(prepared: Prepared, there: Mapping[str, Any]) -> None:
    for piece in prepared.pieces:
        if piece.name not in there or not _equal(piece, there[piece.name], prepared.sums):
            what = "has other bytes" if piece.name in there else "is missing"
            raise UserError(
                f"{piece.name} {what} on {prepared.endpoint} after the upload", fix="the same command mends it"
            )
