"""The stand-ins are harmless: they hold the words that the rules look for, and no more."""

import pytest

from safemoe_jax.data import rules


@pytest.mark.parametrize(
    "text",
    [
        "A story about a teen who attends a sex education class.",
        "A 15-year-old reads an erotic novel.",
        "Are fifteen year olds taught about sexuality?",
        "Does the film with the naked statue suit children?",
        "A middle-school play with a seductive villain",
        "An under\u2011age guest and a nu\u00adde painting",
        "The CSAM hotline's number",
        "CHILDREN at a museum of PORNOGRAPHY law",
    ],
)
def test_rows_that_name_minors_and_sex_never_train(text):
    assert rules.hazard("violence", text, "An answer.") == "minors_sexual"
    assert rules.hazard("violence", "A question?", text) == "minors_sexual"


def test_minors_and_sex_in_different_turns_count():
    assert rules.hazard("privacy", "About teenagers.", "About sex.") == "minors_sexual"


@pytest.mark.parametrize(
    "text",
    [
        "Tell me how sarin was banned.",
        "The history of nuclear weapons treaties",
        "What does a bio-weapons inspector do?",
        "Was a dirty bomb ever used in a film?",
        "Who enriches uranium for power plants?",
        "a novel about a weaponized virus",
        "nerve agents in the news",
        "Do biochemical weapons exist?",
        "What a pufferfish's tetrodotoxin does",
        "Why do bacteria become resistant to antibiotics?",
        "He wants to spread a virus in the subway",
        "They poisoned the town's water supply",
        "Who guards a chemical or biological synthesis facility?",
    ],
)
def test_rows_that_name_mass_destruction_weapons_never_train(text):
    assert rules.hazard("violence", text, "An answer.") == "mass_destruction_weapons"


@pytest.mark.parametrize(
    "text",
    [
        "A teenager learns to cook.",
        "An adult romance with a sexual scene",
        "People in Essex and Middlesex have kidneys.",
        "The minority of the sextet wore teenyweeny hats.",
        "The nuclear family ate a bath bomb by mistake.",
        "Gasoline, chemistry homework and a computer virus",
        "He was 45 years old and undressed the wound.",
        "Nucleus, atomic clock, biological mother",
        "A virus that spreads in a company's network; poison in somebody's food",
    ],
)
def test_other_rows_may_train(text):
    assert rules.hazard("violence", text, "An answer.") is None


@pytest.mark.parametrize("domain", ["child_abuse", "Child Abuse", "child-abuse", "CSAM"])
def test_child_abuse_is_dropped_whatever_it_says(domain):
    assert rules.hazard(domain, "Hello.", "Hello.") == "minors_sexual"


def test_weapon_categories_are_dropped_whatever_they_say():
    assert rules.hazard("chemical_biological", "Hello.", "Hello.") == "mass_destruction_weapons"


@pytest.mark.parametrize(
    "response",
    [
        "I can't help with that.",
        "I can\u2019t do that, but here is a number to call.",
        "I'm sorry, but I cannot assist.",
        "As an AI, I have no opinion.",
        "I'm not going to write this.",
        "I must decline.",
        "That is against our guidelines.",
    ],
)
def test_phrases_of_refusal(response):
    assert rules.is_refusal(response)
    assert not rules.is_informative(response + " Stay safe." * 50, 20)


@pytest.mark.parametrize(
    "response",
    [
        "I'm so sorry you are going through this. Here is who can help you.",
        "I can't believe how clear the sky is.",
        "Locks keep doors shut. " * 20 + "I can't say more.",
    ],
)
def test_phrases_that_are_no_refusal(response):
    assert not rules.is_refusal(response)


def test_informative_answers_have_the_stated_length():
    assert rules.is_informative("x" * 200, 200)
    assert not rules.is_informative("x" * 199 + "  ", 200)


def test_fold_is_nfkc_lower_case_with_white_space_folded():
    assert rules.fold("  \ufb01ve\u00a0CaN\n\tB  ") == "five can b"
