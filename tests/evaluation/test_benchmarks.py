from safemoe_jax.data.corpora import Example
from safemoe_jax.evaluation.benchmarks import held_out


def example(number, prompt, response="r", domain="a", split="test", label="safe", informative=True):
    return Example(
        id=number,
        messages=({"role": "user", "content": prompt},),
        response=response,
        domain=domain,
        label=label,
        source="test",
        split=split,
        informative=informative,
        group=len(prompt),
    )


EXAMPLES = [
    example(0, "one", "good"),
    example(1, "one", "bad", label="unsafe", informative=False),
    example(2, "one", "short", informative=False),
    example(3, "two"),
    example(4, "three", split="train"),
    example(5, "four", domain="b"),
    example(6, "five"),
]


def texts(prompts):
    return [prompt.messages[-1]["content"] for prompt in prompts]


def test_every_unseen_prompt_once_in_the_order_of_the_domains():
    prompts = held_out(EXAMPLES, ["b", "a"], 0)
    assert texts(prompts)[0] == "four"
    assert sorted(texts(prompts)[1:]) == ["five", "one", "two"]
    assert {prompt.benchmark for prompt in prompts} == {"held_out"}


def test_human_answers_go_by_their_label():
    (one,) = (p for p in held_out(EXAMPLES, ["a"], 0) if p.messages[-1]["content"] == "one")
    assert one.safe_answers == ("good",)
    assert one.harmful_answers == ("bad",)


def test_the_cap_takes_the_same_prompts_whatever_the_order_of_the_rows():
    few = held_out(EXAMPLES, ["a", "b"], 2)
    assert [prompt.domain for prompt in few] == ["a", "a", "b"]
    assert few == held_out(EXAMPLES[::-1], ["a", "b"], 2)
    assert texts(few)[:2] == texts(held_out(EXAMPLES, ["a"], 0))[:2]
