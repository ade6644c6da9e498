"""Which rows may train at all, and which safe rows inform: stated phrase rules, no model.

The hazard rules lean to dropping: a harmless row lost costs little, the other mistake is not to be
made. They have no option. Nobody's expert is trained on sexual content about minors, nor on making
chemical, biological, radiological or nuclear weapons.
"""

import re
import unicodedata

CHILD_ABUSE_DOMAINS = frozenset({"child_abuse", "child_sexual_abuse", "child_exploitation", "csam"})
WEAPON_DOMAINS = frozenset({"chemical_biological", "cbrn", "weapons_of_mass_destruction"})

_MINORS = re.compile(
    r"""\b(
      child(ren)?(s|like|hood)? | kids?(die|dies|do|dos)? | minors? | infants? | toddlers?
    | bab(y|ies)
    | (pre-?)?teen(s|age|aged|ager|agers)? | (pre-?)?tweens? | pubescents? | prepubescents?
    | adolescen(t|ts|ce) | juveniles? | youngsters? | youths?
    | under-?\s?age[d]? | not\s+of\s+age | jail-?bait | loli(s|ta|con)? | shota(con)?
    | (little|young|small|school|underage)[\s-]?(girl|boy)s? | (pre-?)?schoolers?
    | (pre-?|elementary|primary|middle|high|secondary|grade|nursery)[\s-]?school(s|ers?)?
    | kindergart(en|ens|ener|eners) | \w+-?graders?
    | (step-?|grand-?)?(son|daughter)s? | nieces? | nephews?
    | (little|younger|baby)\s+(sister|brother)s?
    | (under|below|younger\s+than)\s+(the\s+age\s+of\s+)?(18|eighteen|16|sixteen)
    | (age[ds]?|turned|turning)\s+(of\s+)?([1-9]|1[0-7])
    | ([1-9]|1[0-7])[\s-]*(years?|yrs?|months?|mos?)([\s-]*olds?|\s+of\s+age)
    | ([1-9]|1[0-7])[\s-]*y[./]?o
    | (one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen
      |sixteen|seventeen)[\s-]+years?[\s-]+olds?
    )\b""",
    re.VERBOSE,
)
_SEXUAL = re.compile(
    r"""\b(
      sex(y|ed|es|ts?|ting|ual|ually|uality|uali[sz]\w*)? | porn\w* | erotic\w*
    | nud(e|es|ity|ist|ists) | naked(ness)? | topless | undress\w* | lingerie
    | panties | lewd\w* | lust(s|ful|fully)? | arous(e|es|ed|al|ing)? | orgasm\w*
    | climax(es|ed|ing)? | masturbat\w* | intercourse | foreplay
    | genital\w* | penis(es)? | vagina\w* | breasts? | nipples? | buttocks | groping | groped?
    | fondl\w* | fetish\w* | kinks? | kinky | bdsm | hentai | incest\w* | seduc\w* | molest\w*
    | rap(e|es|ed|ing|ist|ists) | groom(ed|ing|er|ers)? | strip(per|pers|tease|ping)
    | prostitut\w* | escort\w* | virgin(s|ity)? | intimate(ly)? | intimacy
    | mak(e|es|ing)\s+love | made\s+love | (sleep|sleeps|sleeping|slept)\s+with
    )\b""",
    re.VERBOSE,
)
_CHILD_ABUSE = re.compile(
    r"\b(pa?edo(s|phil\w*)?|csam|csem|child\s+(porn\w*|molest\w*|sexual\s+abuse))\b"
)

_WEAPONS = re.compile(
    r"""\b(
      sarin | tabun | soman | cyclosarin | novichok | vx\s+(gas|agent|nerve)
    | nerve\s+(gas|agent)(es|s)?
    | (mustard|phosgene|chlorine|cyanide|cyanogen|poison(ous)?|toxic|lethal|deadly)\s+gas(es|ses)?
    | phosgene | lewisite | hydrogen\s+cyanide | blister(ing)?\s+agents? | chemical\s+agents?
    | ricin | abrin | botulin\w* | anthrax | smallpox | ebola | marburg | tularemia | yersinia
    | (tetrodo|saxi|batracho|cono|epsilon\s)toxins? | chloropicrin
    | antibiotic-resistan\w* | resistan(t|ce)\s+to\s+antibiotics
    | (chemical|biological)\s+(or\s+\w+\s+)?synthesis
    | (spread|releas|aerosoli[sz]|dispers)\w*\s+(\w+\s+){0,3}(virus|bacteri|pathogen|germ)\w*\s+
      (in|at|on|among|across|over)\s+(\w+\s+){0,2}
      (subway|metro|train|airport|air|water|city|crowd|public|population|hospital)s?
    | poison\w*\s+([\w']+\s+){0,3}((water|food)\s+suppl(y|ies)|reservoirs?|waterworks)
    | bio-?weapon\w* | bio-?terror\w* | biological\s+agents? | gain[\s-]of[\s-]function
    | (weaponi[sz]\w*|engineer\w*|synthesi[sz]\w*|lethal|deadly)\s+(\w+\s+){0,2}
      (virus|bacteri|pathogen|toxin)\w*
    | (chemical|biochemical|biological|radiological|nuclear|atomic|thermonuclear|hydrogen|dirty
      |neutron|bio|germ)[\s-]+(\w+[\s-]+)?(weapon\w*|warfare|bombs?|warheads?|attacks?|devices?|explosives?|terroris\w*)
    | weapons?\s+of\s+mass\s+destruction | wmds? | cbrn | nukes? | mass[\s-]casualty
    | (enrich\w*|weapons?-?\s?grade)\s+(uranium|plutonium) | uranium\s+enrich\w* | plutonium
    | critical\s+mass | (c[ae]esium|cobalt|polonium)-?\s?\d+
    | radioactive\s+(material|isotope|source)s?
    )\b""",
    re.VERBOSE,
)

_REFUSAL = re.compile(
    r"""\b(
      sorry[,.]?\s+(but|i)\b | (my\s+)?apologies | i\s+apologi[sz]e
    | i\s+(can(no|')?t|can\s+not|won't|will\s+not)\b
      (?!\s+(believe|imagine|wait|stand|stop|help\s+but))
    | i\s+(must\s+decline|decline|refuse)
    | i('m|\s+am)\s+not\s+(going\s+to|able\s+to|comfortable|permitted|allowed|programmed|designed)
    | as\s+an?\s+(ai|language|responsible|ethical)
    | (against|violates?)\s+(my|our|the)\s+(\w+\s+)?(guidelines|policy|policies)
    | (unable|not\s+able|can(no|')?t|can\s+not|won't)\s+(to\s+)?
      (assist|help|provide|fulfil?l|comply|create|generate|engage|write)
    )\b""",
    re.VERBOSE,
)
_PLAIN: dict[int, str | None] = {0x2018: "'", 0x2019: "'"}
_PLAIN |= dict.fromkeys(range(0x2010, 0x2016), "-")
_PLAIN |= dict.fromkeys([0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF])
_REFUSAL_WITHIN = 200  # characters; a refusal opens with it, an informing answer may say it later


def fold(text: str) -> str:
    """NFKC, lower case, white space folded: two prompts that fold alike are one."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def _plain(text: str) -> str:
    """Folds, with straight quotes and hyphens and nothing invisible: what the rules read."""
    return fold(text.translate(_PLAIN))


def category(name: str) -> str:
    """A harm category's name as a domain: lower case, its words joined by underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def hazardous_domain(domain: str) -> str | None:
    """Why no row of a category may train anything, or None."""
    if category(domain) in CHILD_ABUSE_DOMAINS:
        return "minors_sexual"
    return "mass_destruction_weapons" if category(domain) in WEAPON_DOMAINS else None


def hazard(domain: str, *texts: str) -> str | None:
    """Why a row must not train anything, or None.

    A row is about minors and sex if both are named anywhere in it; it is about weapons of mass
    destruction if one, or an agent or material of one, is named.

    Args:
      domain: the row's harm category.
      texts: all of the row's turns.
    """
    named = hazardous_domain(domain)
    text = _plain("\n".join(texts))
    if named == "minors_sexual" or _CHILD_ABUSE.search(text):
        return "minors_sexual"
    if _MINORS.search(text) and _SEXUAL.search(text):
        return "minors_sexual"
    if named or _WEAPONS.search(text):
        return "mass_destruction_weapons"
    return None


def version() -> str:
    """The rules' text: what was built by other rules is built anew."""
    patterns = (_MINORS, _SEXUAL, _CHILD_ABUSE, _WEAPONS, _REFUSAL)
    domains = sorted(CHILD_ABUSE_DOMAINS | WEAPON_DOMAINS)
    settings = [*domains, str(_PLAIN), str(_REFUSAL_WITHIN)]
    return "\n".join([*(pattern.pattern for pattern in patterns), *settings])


def is_refusal(response: str) -> bool:
    """Whether an answer opens with a phrase of refusal; selects training rows, judges nothing."""
    return bool(_REFUSAL.search(_plain(response)[:_REFUSAL_WITHIN]))


def is_informative(response: str, min_characters: int) -> bool:
    """Whether a safe answer may teach the router: no refusal, and long enough to inform."""
    return len(response.strip()) >= min_characters and not is_refusal(response)
