"""Texts of runs in the words of requests: clients have no flags, no files and no server."""

import re

_MAX_LENGTH = re.compile(r"[Ss]et --config\.data\.max_length=(\d+) to keep all of them(?:, or )?")
_LISTED = re.compile(r"They are listed in \S+ ?")
_OWN_TEMPLATE = re.compile(r"Set --config\.data\.template to a template with tools\.?")
_PLAN = re.compile(r"`jaxft plan[^`]*`, with the same flags, says on which machine it fits\.?")
_OBJECTIVE = re.compile(r"(?:[Ss]uch rows are for )--config\.objective\.name=(\w+)[^.]*\.")


def as_request(text: str, *, context: int = 0) -> str:
    """Returns what a run says, with fields of a request in place of flags and files.

    Args:
      text: What it says.
      context: Tokens that the model was made for; 0: not known. Longer rows are no advice then.
    """

    def within(found: re.Match[str]) -> str:
        if context and int(found[1]) > context:
            return f"The model's context is {context:,} tokens: "
        return found[0]

    text = _MAX_LENGTH.sub(within, text)
    text = _LISTED.sub("", text)
    text = _OWN_TEMPLATE.sub(
        "Begin with a model whose own template has tools, or leave them out.", text
    )
    text = _PLAN.sub(
        "Begin with a smaller model, or ask who runs the server for more memory.", text
    )
    text = _OBJECTIVE.sub(_method, text)
    for name, pattern in (
        ("hyperparameters.lora_rank", r"adapter\.rank"),
        ("hyperparameters.max_length", r"data\.max_length"),
        ("a smaller hyperparameters.batch_size, as rows of a step", r"train\.batch_size"),
    ):
        text = re.sub(rf"--config\.{pattern}=(\S+)", rf"{name}=\1", text)
    text = re.sub(r"--config\.objective\.name=dpo", "method.type='dpo'", text)
    text = re.sub(r"--config\.objective\.name=sft", "method.type='supervised'", text)
    return re.sub(r"--config\.([\w.]+)=(\S+)", r"hyperparameters.config['\1']=\2", text)


def _method(found: re.Match[str]) -> str:
    if found[1] == "dpo":
        return "Such rows are for method.type='dpo'."
    return "This service has no method for such rows."
