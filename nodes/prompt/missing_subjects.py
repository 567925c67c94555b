"""What to say of subjects that will not appear."""

from __future__ import annotations

from collections.abc import Mapping

from ...moa_core.subjects.binding import BoundPrompt
from ...moa_core.subjects.subject import Subject
from ..host.messages import Message

FROM_ANOTHER_CLIP = Message(
    "No subject will appear: the prompt comes from another CLIP.",
    "No positive prompt carries what MoA Patch Model's CLIP noted. Connect it to the positive prompt's "
    "CLIPTextEncode; an encoder with a conditioning of its own drops it.",
)
CHANGED_AFTERWARDS = Message(
    "No subject will appear: the prompt's weights came after its encoding.",
    "MoA Patch Model's CLIP was given a prompt with a subject's word, and no positive prompt is what the CLIP makes of "
    "one: a node has put weights on the finished embedding, or the positive prompt is another's. Encode it with "
    "ComfyUI's own CLIPTextEncode and MoA Patch Model's CLIP; weights in brackets work there.",
)
ENCODED_ALONE = (
    " Of texts that are encoded one by one, a detailer's for each face for example, each has a first one of its own: "
    "there give the people different words."
)


def missing_subjects(
    subjects: Mapping[int, Subject], prompts: list[BoundPrompt | None], read: bool = False
) -> list[Message]:
    """A message for every subject that no positive prompt carries.

    subjects: by the number of their socket. read: whether their CLIP was given a prompt that is not found again.
    """
    known = [prompt for prompt in prompts if prompt is not None]
    if subjects and not known:
        return [CHANGED_AFTERWARDS if read else FROM_ANOTHER_CLIP]
    bound = {binding.subject for prompt in known for binding in prompt.bindings}
    quoted = " and ".join(dict.fromkeys(f"'{prompt.prompt}'" for prompt in known))
    messages = []
    for number, subject in subjects.items():
        if subject not in bound:
            same = sum(other.word == subject.word for before, other in subjects.items() if before <= number)
            lack, times = (
                (f"no '{subject.word}'", "") if same == 1 else (f"not {same} '{subject.word}'", f" {same} times")
            )
            messages.append(
                Message(
                    f"subject{number} will not appear: {lack} in the prompt.",
                    f"The prompt {quoted} does not hold the word '{subject.word}'{times}. Write it there, or change "
                    f"the word of the subject.{'' if same == 1 else ENCODED_ALONE}",
                )
            )
    return messages
