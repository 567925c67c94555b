"""Which token positions of an encoded prompt carry which subject, against the host's own tokenizer."""

import pytest
import torch
from safetensors.torch import save_file

KEY = "moa_bound_prompt"


@pytest.fixture(scope="module")
def people(host, moa):
    with torch.inference_mode():
        return {
            name: host.subject(moa, seed, name.split("_")[0]) for seed, name in enumerate(["man_1", "man_2", "woman"])
        }


def bindings(host, loaded, moa, prompt, *subjects):
    """(position, subject) pairs, and the prompt's tokens as one flat list."""
    model, clip, _ = loaded
    _, bound_clip = host.patch(model, clip, moa, *subjects)
    conditioning = host.prompt(bound_clip, prompt)
    tokens = [token for chunk in bound_clip.tokenize(prompt)["l"] for token, *_ in chunk]
    assert len(tokens) == conditioning[0][0].shape[1]
    return [(b.position, b.subject) for b in conditioning[0][1][KEY].bindings], tokens


def word_of(host, loaded, tokens, position) -> str:
    return loaded[1].tokenizer.clip_l.inv_vocab[tokens[position]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a man in paris", [("man</w>", 1)]),
        ("a (man:1.3) in paris", [("man</w>", 1)]),
        ("((a man)) in paris, (man:0.5)", [("man</w>", 1), ("man</w>", 2)]),
        ("A Man, a MAN.", [("man</w>", 1), ("man</w>", 2)]),
        ("a snowman, a doorman and a woman", []),
        ("lots of words, " * 30 + "a man, " + "and more, " * 20 + "a man", [("man</w>", 1), ("man</w>", 2)]),
    ],
)
def test_the_nth_subject_takes_the_nth_occurrence(host, loaded, moa, people, prompt, expected):
    men = [people["man_1"], people["man_2"]]
    found, tokens = bindings(host, loaded, moa, prompt, *men)
    man = loaded[1].tokenize("man")["l"][0][1][0]
    places = [i for i, token in enumerate(tokens) if isinstance(token, int) and token == man]
    if expected:
        assert [position for position, _ in found] == places
        assert [(word_of(host, loaded, tokens, p), men.index(s) + 1) for p, s in found] == expected
    else:
        assert found == []


def test_each_word_counts_its_own_occurrences(host, loaded, moa, people):
    found, _tokens = bindings(
        host, loaded, moa, "a woman, a man and a man", people["man_1"], people["woman"], people["man_2"]
    )
    by_subject = {id(s): p for p, s in found}
    assert by_subject[id(people["woman"])] == 2
    assert by_subject[id(people["man_1"])] == 5
    assert by_subject[id(people["man_2"])] == 8


def test_a_word_of_several_tokens_binds_on_its_last(host, loaded, moa):
    for word in ("doorman", "old man", "xylophonist"):
        subject = host.subject(moa, 1, word)
        found, tokens = bindings(host, loaded, moa, f"a {word} and a man", subject)
        ids = [t for t, *_ in loaded[1].tokenize(word)["l"][0]][1:]
        length = ids.index(loaded[1].tokenizer.clip_l.end_token)
        assert length > 1
        assert [p for p, _ in found] == [1 + length]  # start token, "a", then the word
        assert tokens[2 : 2 + length] == ids[:length]


def test_embeddings_in_the_prompt_move_positions_as_they_move_tokens(host, loaded, moa, people):
    import folder_paths

    folder = host.base / "models/embeddings"
    save_file({"emb_params": torch.randn(3, 64)}, folder / "three.safetensors")
    assert str(folder) in folder_paths.get_folder_paths("embeddings")
    found, tokens = bindings(host, loaded, moa, "embedding:three a man", people["man_1"])
    assert [p for p, _ in found] == [5]  # start token, three vectors, "a", "man"
    assert all(torch.is_tensor(t) for t in tokens[1:4])


def test_two_prompts_combined_bind_each_its_own(host, loaded, moa, people):
    """ConditioningCombine of prompts with different words; the second subject acts through its own prompt."""
    model, clip, _ = loaded
    patched, bound_clip = host.patch(model, clip, moa, people["man_1"], people["woman"])
    first, second = host.prompt(bound_clip, "a man in paris"), host.prompt(bound_clip, "the sea, a woman swims")
    both = host.run("ConditioningCombine", first, second)[0]
    assert [[b.subject.word for b in c[1][KEY].bindings] for c in both] == [["man"], ["woman"]]
    negative = host.prompt(clip, "bad")
    out = host.sample(patched, both, negative)["samples"]
    no_woman = host.run("ConditioningCombine", first, host.prompt(clip, "the sea, a woman swims"))[0]
    assert not torch.allclose(out, host.sample(patched, no_woman, negative)["samples"], atol=1e-3)


def test_lora_and_clip_skip_after_the_patch_keep_binding(host, loaded, moa, people):
    model, clip, _ = loaded
    _, bound_clip = host.patch(model, clip, moa, people["man_1"])
    skipped = host.run("CLIPSetLastLayer", bound_clip, -2)[0].clone()
    assert [b.position for b in host.prompt(skipped, "a man")[0][1][KEY].bindings] == [2]
    assert KEY not in host.prompt(clip, "a man")[0][1]


def test_one_subject_in_two_sockets_is_two_people_who_look_alike(host, loaded, each_moa):
    model, clip, _ = loaded
    drawn = []
    for people in ([host.subject(each_moa, 1)] * 2, [host.subject(each_moa, 1), host.subject(each_moa, 1)]):
        patched, bound = host.patch(model, clip, each_moa, *people)
        prompts = host.prompt(bound, "a man and a man"), host.prompt(clip, "")
        drawn.append(host.sample(patched, *prompts, steps=4)["samples"])
    assert torch.equal(*drawn)
