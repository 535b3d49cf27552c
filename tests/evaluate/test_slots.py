"""Slots on texts that were judged by hand, on templates that say everything, and on changed tables."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import DataError
from foreword.evaluate.metrics import score
from foreword.evaluate.slots import judge, parse_table

TABLE = (
    "name[The Eagle], eatType[coffee shop], food[French], priceRange[less than £20], customer rating[low], "
    "area[riverside], familyFriendly[no], near[Café Rouge]"
)
VALUES = {
    "name": ["The Eagle", "Alimentum", "The Golden Curry"],
    "eatType": ["pub", "coffee shop"],
    "food": ["French", "Italian", "English", "Fast food", "Japanese", "Chinese", "Indian"],
    "priceRange": ["cheap", "less than £20", "moderate", "£20-25", "high", "more than £30"],
    "customer rating": ["low", "1 out of 5", "average", "3 out of 5", "high", "5 out of 5"],
    "area": ["riverside", "city centre"],
    "familyFriendly": ["yes", "no"],
    "near": ["Café Rouge", "Burger King", "Raja Indian Cuisine"],
}
tables = st.fixed_dictionaries(
    {"name": st.sampled_from(VALUES["name"])},
    optional={slot: st.sampled_from(values) for slot, values in VALUES.items() if slot != "name"},
)


def written(table):
    return ", ".join(f"{slot}[{value}]" for slot, value in table.items())


def told(table):
    """A sentence for each slot."""
    sentences = {
        "name": "{} is a place.", "eatType": "It is a {}.", "food": "It serves {} food.",
        "priceRange": "The price range is {}.", "customer rating": "It has a customer rating of {}.",
        "area": "It is in the {} area.", "near": "It is near {}.",
    }  # fmt: skip
    family = {"yes": "It is family friendly.", "no": "It is not family-friendly."}
    return " ".join(family[v] if s == "familyFriendly" else sentences[s].format(v) for s, v in table.items())


def one(text, table=TABLE, *others):
    return judge([text, *others], [table, *others])[0]


@given(tables)
def test_a_text_that_says_all_says_nothing_else(table):
    found = one(told(table), written(table))
    assert found.slots == len(table) and not found.missing and not found.hallucinated


@given(tables, st.sampled_from(sorted(set(VALUES) - {"name"})))
def test_a_sentence_left_out_is_missing_and_one_too_many_is_invented(table, slot):
    whole = {**table, slot: VALUES[slot][0]}
    less = {k: v for k, v in whole.items() if k != slot}
    assert [s for s, _ in one(told(less), written(whole)).missing] == [slot]
    wrong = judge([told(whole)] * 2, [written(less), written(whole)])[0]
    assert len(wrong.hallucinated) == 1 and wrong.hallucinated[0][0] == ("name" if slot == "near" else slot)


@given(tables, st.randoms(use_true_random=False))
def test_the_order_of_slots_does_not_matter(table, chance):
    items = list(table.items())
    chance.shuffle(items)
    assert one(told(table), written(dict(items))) == one(told(table), written(table))


@pytest.mark.parametrize(
    ("text", "missing", "hallucinated"),
    [
        # Wordings of E2E's references for the same table.
        ("The Eagle is an inexpensive French café by the river near the Café Rouge. It is rated 1 out of 5 and "
         "isn't for children.", "", ""),
        ("Near Cafe Rouge is The Eagle, a poorly rated, adults only coffee shop on the riverside with French dishes "
         "for under £20.", "", ""),
        ("The Eagle by Café Rouge: cheap French coffee shop, riverside, one star, no kids.", "", ""),
        ("The Eagle is a cheap French coffee shop near Café Rouge on the river. It does not have a good customer "
         "rating and is not child friendly.", "", ""),
        ("The Eagle: unsuitable for children, low costumer rating. The prices at The Eagle are low. A French coffee "
         "shop on the river by Café Rouge.", "", ""),
        ("Customers rate The Eagle low. A French coffee shop on the river by Café Rouge, with prices in the low range, "
         "it is no place for kids.", "", ""),
        ("Cheap French coffee shop The Eagle, riverside, near Café Rouge, has a customer rating of 1 out of 5 stars. "
         "Children not allowed.", "", ""),
        # Things left out, said wrongly, made up.
        ("Not only is The Eagle by Café Rouge family friendly: it is a cheap French coffee shop on the river with "
         "moderate ratings.", "customer rating familyFriendly", "customer rating familyFriendly"),
        ("The Eagle is a French coffee shop near Café Rouge on the riverside.",
         "customer rating familyFriendly priceRange", ""),
        ("The Eagle is an expensive French coffee shop near Café Rouge, riverside, low rating, not family friendly.",
         "priceRange", "priceRange"),
        ("The Eagle is a cheap French pub near Café Rouge, riverside. It has a high customer rating. Families welcome.",
         "customer rating eatType familyFriendly", "customer rating eatType familyFriendly"),
        ("Alimentum, a cheap French coffee shop near Café Rouge, riverside, has a low customer rating. No children.",
         "name", "name"),
        ("The Eagle restaurant serves cheap French food near Café Rouge in the city centre. Low ratings. No kids.",
         "area eatType", "area"),
    ],
)  # fmt: skip
def test_texts_judged_by_hand(text, missing, hallucinated):
    found = one(text, TABLE, "name[Alimentum], food[English]")
    assert " ".join(s for s, _ in found.missing) == missing
    assert " ".join(s for s, _ in found.hallucinated) == hallucinated


def test_a_name_is_not_a_slot():
    """A curry in a name is not Indian food, and the longest name counts."""
    table = "name[The Golden Curry], near[Raja Indian Cuisine], food[English]"
    found = one("The Golden Curry serves English food near Raja Indian Cuisine.", table, "name[Curry]")
    assert not found.missing and not found.hallucinated


def test_a_restaurant_claims_nothing_and_tables_of_other_domains_are_read():
    assert not one("The Eagle is a restaurant.", "name[The Eagle]").hallucinated
    table = "city[San Juan], temperature[12 degrees], windy[yes]"
    found = one("In san juan it will be 12 degrees.", table, "city[Lima], temperature[3 degrees]")
    assert found.slots == 2 and not found.missing and not found.hallucinated  # a yes cannot be looked for
    assert one("In Lima it will be 12 degrees.", table, "city[Lima], temperature[3 degrees]").hallucinated == (
        ("name", "lima"),
    )


def test_the_metrics_are_shares():
    tables = ["name[A One], food[French]", "name[B Two], food[English], area[riverside]"]
    texts = ["A One serves French food.", "B Two serves Italian food."]
    found = score(texts, metrics=["slot-coverage", "slot-hallucinated", "slot-error"], inputs=tables)
    assert found["slot-coverage"].value == pytest.approx(100 * 3 / 5)
    assert found["slot-hallucinated"].value == pytest.approx(50)
    assert found["slot-error"].value == pytest.approx(100 * (2 + 1) / 5)


def test_what_is_no_table():
    assert parse_table("name[X], customer rating[5 out of 5]") == {"name": "X", "customer rating": "5 out of 5"}
    with pytest.raises(DataError, match="'just a text' is not a table"):
        parse_table("just a text")


def test_nonsense_covers_nothing():
    chance = random.Random(0)
    words = ["lorem", "ipsum", "dolor", "sit", "amet", "consectetur"]
    found = one(" ".join(chance.choice(words) for _ in range(50)))
    assert len(found.missing) == found.slots == 8 and not found.hallucinated
