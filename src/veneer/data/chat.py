"""Conversations: one shape for all of them, the model's chat template, and where the answers stand in its text.

Masking a wrong stretch trains the wrong thing without a sign of it. So an answer is taken to begin where the
template, given the turns before it, asks for one; there it must stand, and end with a special token, or where the
template, given the answer too, ends. What the template writes so far must be the beginning of the whole text. A
template that marks answers itself (`{% generation %}`) is taken at its word. Anything else is an error.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from veneer.data.masking import Draft, Span
from veneer.data.table import describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

# Names of the roles in chat templates, and those of the ShareGPT format.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BREAKS_PREFIX = (
    "the chat template writes message {number} differently once others follow, so the answer cannot be told from "
    "the rest. Train on conversations that end with their only answer, use a template with {{% generation %}} "
    "marks, or set data.train_on to all"
)


def conversation(value: Any) -> list[Message]:
    """Messages with `role` and `content`, from that form or from `from` and `value`.

    Raises:
        ValueError: With the reason, if the value is no conversation with an answer in it.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list of messages, found {describe(value)}")
    messages = [_message(entry, number) for number, entry in enumerate(value, 1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is no answer to learn")
    return messages


def _message(entry: Any, number: int) -> Message:
    if not isinstance(entry, dict):
        raise ValueError(f"message {number}: expected an object with role and content, found {describe(entry)}")
    # Tables fill the keys that only other messages have with null.
    message = {key: value for key, value in entry.items() if value is not None}
    if "from" in message and "role" not in message:
        message["role"] = message.pop("from")
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}, expected one of {', '.join(ROLES)}")
    message["role"] = ROLES[role]
    if content is None and "tool_calls" in message:
        return message
    if content is not None and not isinstance(content, str):
        raise ValueError(f"message {number}: expected a text as content, found {describe(content)}")
    if message["role"] in ("user", "assistant") and not (content or "").strip():
        raise ValueError(f"message {number} ({message['role']}) is empty")
    return message


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, ask: bool = False) -> str:
    """The conversation as text; `ask` adds what the template puts before an answer.

    Raises:
        ValueError: If the template refuses the conversation, with its reason.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # a template is a program: it can raise anything
        raise ValueError(f"the chat template refuses the conversation ({type(error).__name__}: {error})") from error


def chat_draft(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, everything: bool = False, length: int | None = None
) -> Draft:
    """A conversation as text, with each of the assistant's turns as a trained stretch.

    Args:
        messages: The conversation.
        tokenizer: With a chat template.
        everything: All tokens will be trained on, so turns that cannot be told from the rest are left out.
        length: The text will be cut to so many tokens, so turns behind them need not be found.

    Raises:
        ValueError: If the template refuses the conversation, or its text does not show where the turns begin and end.
    """
    stops = stop_strings(tokenizer)
    text = render(messages, tokenizer)
    try:
        spans, partial = _answers(messages, text, stops, tokenizer, length)
    except ValueError:
        if not everything:
            raise
        spans, partial = [], True
    # A template that ends in plain text never says stop, so the end of text is added and learnt.
    unfinished = messages[-1]["role"] == "assistant" and not text.rstrip().endswith(stops)
    return Draft(text, spans, stop=unfinished, partial=partial)


def _answers(
    messages: list[Message], text: str, stops: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, length: int | None
) -> tuple[list[Span], bool]:
    """Where the assistant's turns stand, each with the token that ends it; and whether some were not looked for."""
    template = tokenizer.get_chat_template()
    partial = False
    if _GENERATION.search(template):
        marked = _marked(messages, template, tokenizer)
        spans = [(start, _with_stop(text, end, stops, tokenizer)) for start, end in marked if end > start]
    else:
        spans = []
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        # Each turn costs a rendering of all before it, which for long conversations is most of the work.
        until = _cut(text, tokenizer, length) if length is not None and len(turns) > 2 else len(text)
        for number in turns:
            span = _turn(messages, number, text, stops, tokenizer)
            partial = span[0] >= until
            if partial:
                break
            spans.append(span)
    return [(start, _without_space(text, start, end, stops)) for start, end in spans], partial


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> int:
    """Where the first `length` tokens of a text end, or somewhat behind."""
    # Tokens of more than eight characters on average are rare, so this much of the text is nearly always enough.
    head = text[: 8 * length]
    if len(text) <= length:
        return len(text)
    tokens = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = tokens["offset_mapping"]
    return len(text) if len(offsets) <= length else int(offsets[length][1])


def stop_strings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Added tokens, special or not: among them is the one that ends a turn, if the template has one."""
    contents = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    return tuple(sorted((content for content in contents if content.strip()), key=lambda text: (-len(text), text)))


def _turn(
    messages: list[Message], number: int, text: str, stops: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> Span:
    """Where the answer `messages[number]` stands in the text of the whole conversation."""
    if number == 0:
        raise ValueError("the conversation begins with the assistant; put the user's or a system message first")
    before = render(messages[:number], tokenizer, ask=True)
    if not text.startswith(before):
        # Some templates ask for an answer with more than they write before one (an opened thought, say).
        raise ValueError(_BREAKS_PREFIX.format(number=number + 1))
    start = len(before)
    # The usual case, without another rendering: the answer stands there word for word, and a special token closes it.
    # It is the only way for templates of reasoning models, which write the last answer otherwise than earlier ones.
    message = messages[number]
    if set(message) == {"role", "content"}:
        end = _closed(text, start, message["content"].strip(), stops)
        if end is not None:
            return start, end
    through = text if number == len(messages) - 1 else render(messages[: number + 1], tokenizer)
    if not text.startswith(through) or len(through) <= start:
        raise ValueError(_BREAKS_PREFIX.format(number=number + 1))
    return start, len(through)


def _closed(text: str, start: int, content: str, stops: tuple[str, ...]) -> int | None:
    """The end of the special token behind `content`, if these two and perhaps white space are what stands there."""
    place = _after_space(text, start)
    if not text.startswith(content, place):
        return None
    place = _after_space(text, place + len(content))
    return next((place + len(stop) for stop in stops if text.startswith(stop, place)), None)


def _after_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _marked(messages: list[Message], template: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The stretches that the template marks with `{% generation %}`."""
    # Not apply_chat_template's own token mask: where the tokenizer drops the last character of an answer (a line
    # break, say) it marks everything up to the end.
    from transformers.utils.chat_template_utils import render_jinja_template

    function: Any = render_jinja_template  # its annotations are not those of what it takes and returns
    _, spans = function(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [(int(start), int(end)) for start, end in spans[0]]


def _with_stop(text: str, end: int, stops: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds the special token behind a marked answer: a model that never learns it never stops."""
    if text[:end].rstrip().endswith(stops):
        return end
    ends = [stop for stop in stops if stop != tokenizer.bos_token or stop == tokenizer.eos_token]
    return end + next((len(stop) for stop in ends if text.startswith(stop, end)), 0)


def _without_space(text: str, start: int, end: int, stops: tuple[str, ...]) -> int:
    """Leaves out white space behind the token that ends the turn: generation stops before it."""
    stripped = text[start:end].rstrip()
    return start + len(stripped) if stripped.endswith(stops) else end


def in_words(messages: list[Message]) -> str:
    """A conversation for people: the only message alone, several with their roles."""
    shown = [message for message in messages if message["role"] not in ("system", "developer")]
    if len(shown) == 1:
        return str(shown[0].get("content", ""))
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in shown)
