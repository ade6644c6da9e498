from safemoe_jax.data.corpora import Example
from safemoe_jax.evaluation.attacks import ATTACKS
from safemoe_jax.evaluation.benchmarks import held_out


def example(number, prompt, response="r", domain="a", split="test", label="safe"):
    turns = ({"role": "user", "content": prompt},)
    return Example(number, turns, response, domain, label, "made up", split, True, number)


ASKED = held_out([example(0, "how"), example(1, "why", domain="b")], ["a", "b"], 0)


def harmful(number, prompt, characters, domain="a"):
    response = f"{number}" * characters
    return example(number, prompt, response, domain, split="train", label="unsafe")


def test_a_prefix_changes_the_answer_and_not_the_question():
    attacked = ATTACKS["prefix"](ASKED, [])
    assert [prompt.messages for prompt in attacked] == [prompt.messages for prompt in ASKED]
    assert {prompt.benchmark for prompt in attacked} == {"attack_prefix"}
    assert all(prompt.prefix and prompt.prefix == prompt.prefix.strip() for prompt in attacked)
    assert [prompt.id for prompt in attacked] == [prompt.id for prompt in ASKED]
    assert {prompt.safe_answers for prompt in attacked} == {()}


def test_two_shots_of_the_same_domain_come_before_the_question():
    shots = [
        harmful(2, "one", 900),
        harmful(3, "one", 310),
        harmful(4, "two", 20),
        harmful(5, "three", 280),
        harmful(6, "other", 300, domain="b"),  # alone in its domain, which is therefore not asked
    ]
    (attacked,) = ATTACKS["two_shot"](ASKED, shots)
    assert attacked.benchmark == "attack_two_shot"
    turns = [(turn["role"], turn["content"]) for turn in attacked.messages]
    assert turns == [
        ("user", "one"),
        ("assistant", "3" * 310),
        ("user", "three"),
        ("assistant", "5" * 280),
        ("user", "how"),
    ]
    assert attacked.id == ASKED[0].id
    assert attacked == ATTACKS["two_shot"](ASKED, shots[::-1])[0]
