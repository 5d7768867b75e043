"""Token ids of prompts and responses, and back to text: plain, or as the tokenizer's chat template writes turns.

The tokenizer alone decides. Without a template a prompt is its text after BOS, a response one space, its text and EOS.
With one, a prompt is its conversation with the generation prompt, and a response is what the template writes as the
assistant's turn, up to the token that ends it: the tokenizer's EOS (models/tokenizers.py). Special tokens that are
written in a text stay text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tqdm.auto import tqdm

from rlhf_cli.data.dialogue import messages, render
from rlhf_cli.errors import DataError

CHUNK = 2_000  # texts per tokenizer call
PROGRESS_FROM = 20_000  # texts; below, tokenisation takes about a second
PROBE = "pr0be"  # stands for the assistant's words where a template is looked at
TODAY = "26 Jul 2024"  # Llama-3's templates write a date: a fixed one, or prompts would be others tomorrow
ANCHOR = "\n"  # a text after it is one that goes on: sentencepiece puts no space of its own before it


@dataclass(frozen=True)
class Form:
    """How a tokenizer writes turns.

    Args:
        start: ids before a plain prompt: BOS, or nothing.
        opening: ids that the template writes before the assistant's words, beyond its generation prompt.
        before: what stands between a prompt and the words of the response: one space, or the template's.
        after: white space that the template writes between these words and EOS.
        prepends: the tokenizer puts a space of its own before a text, as sentencepiece does.
        system: the template takes system messages.
        marks: what reading a prompt gives before, between and after what is said: before the first user, between user
            and assistant, between assistant and user, after the last user; then, if there is a system text, before
            it, and between it and the user. Empty without a template.
    """

    start: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    before: str = " "
    after: str = ""
    prepends: bool = False
    system: bool = True
    marks: tuple[str, ...] = ()


_FORMS: WeakKeyDictionary[Any, tuple[object, Form]] = WeakKeyDictionary()


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each prompt, with BOS, or with all that the chat template puts around it.

    Raises:
        DataError: the template refuses a conversation.
    """
    form = _form(tokenizer)
    if not tokenizer.chat_template:
        return [[*form.start, *ids] for ids in _ids(tokenizer, prompts)]
    progress = tqdm(prompts, desc="tokenising", unit="text", disable=len(prompts) <= PROGRESS_FROM)
    return [[*_conversation_ids(tokenizer, form, prompt), *form.opening] for prompt in progress]


def response_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each response, stripped, as it follows a prompt, with EOS at its end, however long it is."""
    form = _form(tokenizer)
    turns = [f"{form.before}{text.strip()}{form.after}" for text in texts]
    return [[*ids, tokenizer.eos_token_id] for ids in _continued(tokenizer, form, turns)]


def response_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of a response up to its EOS, stripped: what `response_ids` would encode.

    Other special tokens stay visible: an <unk> dropped from a sampled response would turn it into a valid answer.
    """
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return _read(tokenizer, ids).strip()


def prompt_text(tokenizer: Any, ids: Sequence[int], *, dialogues: bool) -> str:
    """Return the text of a prompt that `prompt_ids` has encoded, for a model that reads another tokenizer's ids.

    Args:
        tokenizer: which encoded it.
        ids: of the prompt.
        dialogues: whether the prompts of this dataset have markers of turns (dialogue.py): a template makes one message
            of a question either way, so it cannot be told from the ids.
    """
    form = _form(tokenizer)
    if not form.marks:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    first, answer, question, last, *system = form.marks
    text, turns = _read(tokenizer, ids).removesuffix(last), []
    if system and not text.startswith(first):
        said, _, text = text.removeprefix(system[0]).partition(system[1])
        turns.append({"role": "system", "content": said})
    text, role, mark = text.removeprefix(first), "user", PROBE
    while mark:  # found: what follows it is another turn
        said, mark, text = text.partition(answer if role == "user" else question)
        turns.append({"role": role, "content": said})
        role = "assistant" if role == "user" else "user"
    return render(turns) if dialogues or len(turns) > 1 else turns[0]["content"]


def same_turns(first: Any, second: Any) -> bool:
    """Return whether two tokenizers give the same ids to all prompts and responses."""
    names = ("chat_template", "bos_token", "eos_token")
    same = all(getattr(first, name) == getattr(second, name) for name in names)
    return first is second or (same and first.get_vocab() == second.get_vocab())


def _form(tokenizer: Any) -> Form:
    """Return how `tokenizer` writes turns; found out again if its template or its tokens have changed."""
    state = (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    known = _FORMS.get(tokenizer)
    if known is None or known[0] != state:
        known = _FORMS[tokenizer] = (state, _find_form(tokenizer))
    return known[1]


def _find_form(tokenizer: Any) -> Form:
    first = tokenizer.convert_ids_to_tokens(_ids(tokenizer, ["x"])[0][:1])
    prepends = bool(first) and first[0].startswith(("▁", "Ġ"))
    if not tokenizer.chat_template:
        bos = tokenizer.bos_token_id
        # Where BOS is EOS (GPT-2, Pythia), a prompt begins with it only if the tokenizer itself says so.
        own = bos is not None and (bos != tokenizer.eos_token_id or tokenizer("x")["input_ids"][:1] == [bos])
        return Form(start=(bos,) if own else (), prepends=prepends)
    question = [{"role": "user", "content": "?"}]
    asked = _rendered(tokenizer, question, add_generation_prompt=True)
    head, _, tail = _rendered(tokenizer, [*question, {"role": "assistant", "content": PROBE}]).rpartition(PROBE)
    opening = head.removeprefix(asked) if head.startswith(asked) else ""
    before = opening[len(opening.rstrip(" ")) :]
    opening = opening.removesuffix(before)
    after = tail.partition(tokenizer.eos_token)[0] if tokenizer.eos_token in tail else ""
    form = Form(
        opening=tuple(tokenizer(opening, add_special_tokens=False, split_special_tokens=False)["input_ids"]),
        before=before,
        after="" if after.strip() else after,
        prepends=prepends,
        system=_takes_system(tokenizer),
    )
    return replace(form, marks=_marks(tokenizer, form))


def _marks(tokenizer: Any, form: Form) -> tuple[str, ...]:
    """Return what stands around the words of a conversation where its ids are read; () if the template refuses one."""
    user, assistant = f"\n\nHuman: {PROBE}", f"\n\nAssistant: {PROBE}"
    asked = [f"{user}{assistant}{user}\n\nAssistant:", f"{PROBE}{user}\n\nAssistant:"]
    found: list[str] = []
    try:
        for prompt in asked[: 1 + form.system]:
            ids = [*_conversation_ids(tokenizer, form, prompt), *form.opening]
            found += _read(tokenizer, ids).split(PROBE)[: 2 if found else None]
    except DataError:
        return ()
    return tuple(found) if len(found) == 4 + 2 * form.system and all(found[1:3]) else ()


def _read(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _takes_system(tokenizer: Any) -> bool:
    conversation = [{"role": "system", "content": PROBE}, {"role": "user", "content": "?"}]
    try:
        return PROBE in _rendered(tokenizer, conversation)
    except (TemplateError, ValueError):
        return False


def _rendered(tokenizer: Any, conversation: list[dict[str, str]], **how: Any) -> str:
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, date_string=TODAY, **how))


def _conversation_ids(tokenizer: Any, form: Form, prompt: str) -> list[int]:
    turns = messages(prompt)
    if not form.system and turns[0]["role"] == "system":  # Gemma, Mistral: a system text begins the first message
        text = "\n\n".join(turn["content"].strip() for turn in turns[:2])
        turns = [{"role": "user", "content": text}, *turns[2:]]
    try:
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False, date_string=TODAY
        )
        return list(ids)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        todo = "set model.chat_template=none for plain dialogue text, or name a template file that can"
        raise DataError(f"the chat template cannot write a conversation of {roles}", str(error), todo) from error


def _continued(tokenizer: Any, form: Form, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts as they go on after others."""
    if not form.prepends:
        return _ids(tokenizer, texts)
    anchor = _ids(tokenizer, [ANCHOR])[0]
    found = _ids(tokenizer, [ANCHOR + text for text in texts])
    if all(ids[: len(anchor)] == anchor for ids in found):
        return [ids[len(anchor) :] for ids in found]
    return _ids(tokenizer, [text.removeprefix(" ") for text in texts])  # its own space is the one


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of the texts alone; special tokens in them are text."""
    ids: list[list[int]] = []
    how = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    with tqdm(total=len(texts), desc="tokenising", unit="text", disable=len(texts) <= PROGRESS_FROM) as bar:
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            ids += tokenizer(chunk, **how)["input_ids"]
            bar.update(len(chunk))
    return ids
