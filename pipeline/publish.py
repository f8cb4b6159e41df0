"""The model card of a run, and its upload to the Hugging Face hub for --push_to_hub.

The card's text is the template `model_card.md` next to this file.
"""

import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path

from pipeline.arguments import as_typed
from pipeline.errors import InputError, RunError, one_line, reason
from pipeline.hub import is_local, who_am_i
from pipeline.metrics import printed
from pipeline.run_folder import RUN_FILES, writing

TEMPLATE = Path(__file__).with_name("model_card.md")
# Not uploaded: files with rows of the data set, and everything in a subfolder.
NOT_UPLOADED = ("*predictions.csv", "test_answers.json", "*/*")


def write_model_card(folder, run):
    """Write the folder's README.md, the model card: base model, data, arguments, metrics, how to load.

    run: the record of `run_record`. For an adapter the fields that peft put into the card's header are kept.
    """
    from huggingface_hub import ModelCard, ModelCardData

    args = run["args"]
    path = Path(folder, "README.md")
    data = ModelCard.load(path, ignore_metadata_errors=True).data if path.exists() else ModelCardData()
    local = is_local(args["model_name"])
    data.base_model = None if local else args["model_name"]  # the hub accepts only its own ids here
    data.library_name = "peft" if run["method"] == "lora" else "transformers"
    data.language = "en"
    tags = [tag for tag in data.tags or [] if not (local and tag.startswith("base_model:"))]
    data.tags = sorted({*tags, "question-answering", "tweet_qa", "t5"})
    data.metrics = ["f1", "exact_match"]
    if not is_local(args["dataset"]):
        data.datasets = [args["dataset"]]
    scored = run.get("eval_only") or args
    held_out = (run.get("holdout") or {}).get("metrics")
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        run=run,
        scored=scored,
        name=scored.get("push_to_hub") or Path(scored["save_dir"]).name,
        final=printed(run["final"]) if run["final"] else None,
        held_out=printed(held_out) if held_out else None,
        arguments={name: as_typed(value) for name, value in args.items()},
    )
    with writing(path) as beside:
        beside.write_text(card.content, encoding="utf-8")


def check_can_push(repo):
    """Raise InputError unless the hub answers and accepts the token that will write to `repo`."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub {repo}: {one_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"--push_to_hub {repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded")
    if not get_token():
        raise InputError(f"--push_to_hub {repo} needs a token: run `hf auth login` first, or set HF_TOKEN")
    try:
        token = who_am_i().get("auth", {}).get("accessToken", {})
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError(f"--push_to_hub {repo}: the hub refuses the token; `hf auth login` sets another") from None
        raise InputError(f"--push_to_hub {repo}: the hub answers {error.response.status_code}; try later") from None
    except Exception as error:  # only its name: the message of a malformed header would quote the token
        raise InputError(f"--push_to_hub {repo}: the hub cannot be reached ({type(error).__name__})") from None
    if token.get("role") == "read":
        raise InputError(f"--push_to_hub {repo}: the token can only read; use one with write access")


def upload(setup):
    """Upload the run of a Setup if --push_to_hub asks for it, once all processes have written their files."""
    setup.accelerator.wait_for_everyone()
    if setup.args.push_to_hub and setup.accelerator.is_main_process:
        setup.say(f"uploaded: {push(setup.folder, setup.args.push_to_hub)}")


def push(folder, repo):
    """Upload checkpoint, model card, run.json, curves and tables to `repo`, which is created if it does not exist.

    Returns its address. Raises RunError, whose message says how to repeat the upload.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars

    constants.HF_HUB_OFFLINE = False  # as at the start of the run; a hub that failed meanwhile sets it
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        who_am_i()  # an upload has no time limit: do not start one if the hub does not answer
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        files = [name for name in (*RUN_FILES, "run.json") if not any(fnmatch(name, p) for p in NOT_UPLOADED)]
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=files, commit_message="Upload a TweetQA run"
        )
    except Exception as error:
        raise RunError(f"the upload failed ({reason(error)}); repeat it with: {upload_command(folder, repo)}") from None
    return str(address)


def upload_command(folder, repo):
    """The command that uploads the same files as `push`."""
    exclude = [word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repo, str(folder), ".", *exclude])
