"""The synthetic world behind benchmarks.generate: who likes what, what is shown, what is clicked.

Everything is known, so a test can ask how good a model could be at best. With s the share of the log's time that has passed:

    interest of a user     v(s) = (1 - s) · start + s · end                        width D, drifts over the log
    affinity               v(s) · z                                                z: the item's vector, near its topic's
    click                  Bernoulli(σ(CLICK · [1, affinity, quality, log position] + device))
    purchase, given click  Bernoulli(σ(PURCHASE · [1, affinity, log(price ÷ 20)]))
    rating                 for 40 % of purchases and 10 % of other clicks: RATING · [1, affinity, quality, noise], rounded to 1-5
    what is shown          the logging policy draws a topic (with EXPLORE from what is popular now, else one that the user liked
                           at the start), then an item of it. Each slot of a slate draws from another of six strata of the topic's
                           items, so that a slate holds no item twice and the probability that this slot shows this
                           item is known: that is `propensity`. Topics, and the items of a stratum, follow Zipf's law.

Users and items arrive over time: a share is there from the start. Everything is drawn from (seed, what, number of the chunk).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

CHUNK = 1 << 17
"""Events drawn together. A change changes the log."""
START_MS = 1_704_067_200_000
"""2024-01-01 UTC."""
DAY_MS = 86_400_000
WIDTH, STRATA = 8, 6
EXPLORE = 0.3
LIKES = np.array([0.6, 0.3, 0.1])
"""Weights of a user's three topics."""
CLICK = np.array([-2.6, 3.2, 0.5, -0.5])
PURCHASE = np.array([-2.2, 1.5, -0.5])
RATING = np.array([2.8, 1.4, 0.5, 0.8])
DEVICES = ("phone", "web", "tablet")
DEVICE_EFFECT = np.array([0.0, 0.2, -0.2, 0.0])
"""Of DEVICES, and of a missing device."""

SEGMENTS = {
    "sport": {
        "running": "shoes trail marathon sprint jogging pace laces track",
        "cycling": "bike saddle pedal helmet gravel tyre chain frame",
        "swimming": "goggles pool fins wetsuit diving lane kickboard towel",
        "climbing": "rope harness carabiner boulder chalk summit cliff belay",
    },
    "home": {
        "garden": "seeds shovel lawn roses compost greenhouse hose pruner",
        "kitchen": "pan knife oven whisk kettle skillet apron grater",
        "furniture": "sofa shelf table wardrobe lamp armchair desk cushion",
        "tools": "drill hammer screwdriver saw pliers wrench toolbox sander",
    },
    "media": {
        "novels": "mystery romance thriller saga paperback detective story chapter",
        "music": "guitar piano vinyl drums violin songbook amplifier choir",
        "films": "western comedy documentary drama director cinema sequel noir",
        "games": "puzzle dice console chess strategy cards arcade quest",
    },
    "food": {
        "coffee": "espresso roast beans grinder latte filter arabica crema",
        "baking": "flour yeast sourdough cake dough pastry muffin icing",
        "spices": "pepper cinnamon curry saffron paprika cumin ginger turmeric",
        "cheese": "brie cheddar gouda parmesan goat rind camembert fondue",
    },
}
TOPICS = [topic for topics in SEGMENTS.values() for topic in topics]
WORDS = np.array([words.split() for topics in SEGMENTS.values() for words in topics.values()], dtype=object)
ADJECTIVES = np.array(["Classic", "Fine", "Bold", "Modern", "Rustic", "Compact", "Simple", "Golden", "Quiet"], dtype=object)
CELLS = len(TOPICS) * STRATA


@dataclass(frozen=True)
class Parameters:
    """What a world and its log depend on, and nothing else."""

    events: int
    """Impressions."""
    seed: int = 0
    users: int = 0
    """0: one for 200 events."""
    items: int = 0
    """0: one for 200 events, at least 200 and at most a million."""
    days: int = 30
    dirty: float = 0.0
    """Bad rows added to each good one, on average."""
    long: bool = False
    """Rows of impressions, clicks, purchases and ratings instead of one row with all labels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "users", self.users or max(50, self.events // 200))
        object.__setattr__(self, "items", self.items or min(max(200, self.events // 200), 1_000_000))
        if self.events < 1 or self.users < 1 or self.days < 1 or self.seed < 0 or not 0 <= self.dirty <= 1:
            raise ValueError("events, users and days are at least 1, the seed at least 0, dirty a share between 0 and 1")
        if self.items < CELLS:
            raise ValueError(f"items: {self.items} is too few, every topic needs some of them: at least {CELLS}")

    @property
    def chunks(self) -> int:
        return -(-self.events // CHUNK)


class World:
    """Users and items of a world. U users, I items, D = WIDTH, T topics; arrays are indexed by the number in the id."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        rng = np.random.default_rng([parameters.seed, 0])
        n_users, n_items, n_topics = parameters.users, parameters.items, len(TOPICS)
        self.topic_TD = _unit(rng.standard_normal((n_topics, WIDTH)))
        self.topic_share = rng.permutation(1.0 / np.arange(1, n_topics + 1))
        self.topic_share /= self.topic_share.sum()
        self.topic_phase = rng.random(n_topics)

        rank = rng.permutation(n_items)
        cell = rank % CELLS  # a stratum of a topic; every one has items
        self.item_topic = (cell // STRATA).astype(np.int16)
        self.item_weight = 1.0 / (rank // CELLS + 1.0)
        self.item_birth = np.where((rank < CELLS) | (rng.random(n_items) < 0.8), 0.0, rng.random(n_items))
        self.item_ID = _unit(self.topic_TD[self.item_topic] + 0.2 * rng.standard_normal((n_items, WIDTH))).astype(np.float32)
        self.item_quality = rng.standard_normal(n_items).astype(np.float32)
        self.item_price = np.exp(3.0 + 0.6 * rng.standard_normal(n_items))
        self.item_phase = rng.random(n_items)
        self._order = np.lexsort((self.item_birth, cell))
        self._sorted_birth = (cell + self.item_birth)[self._order]
        self._cumulative = np.concatenate([[0.0], np.cumsum(self.item_weight[self._order])])
        self._first = np.searchsorted(self._sorted_birth, np.arange(CELLS))

        self.likes_start_U3 = self._draw_likes(rng, n_users)
        moves = rng.random((n_users, 1)) < 0.5  # half of the users end with other topics
        self.likes_end_U3 = np.where(moves, self._draw_likes(rng, n_users), self.likes_start_U3)
        own_UD = 0.2 * rng.standard_normal((n_users, WIDTH))
        self.start_UD, self.end_UD = (
            _unit(np.einsum("j,ujd->ud", LIKES, self.topic_TD[likes]) + own_UD).astype(np.float32)
            for likes in (self.likes_start_U3, self.likes_end_U3)
        )
        self._activity = np.cumsum(np.exp(rng.standard_normal(n_users)))
        self.user_device = rng.choice(len(DEVICES), n_users, p=[0.6, 0.3, 0.1]).astype(np.int8)
        self._text_seed = [parameters.seed, 1]

    def _draw_likes(self, rng: np.random.Generator, n: int) -> Ints:
        return np.searchsorted(np.cumsum(self.topic_share)[:-1], rng.random((n, 3))).astype(np.int16)

    # ----------------------------------------------------------------- the truth

    def passed(self, time: Ints) -> Floats:
        """Milliseconds -> s, the share of the log's time that has passed."""
        return (np.asarray(time) - START_MS) / (self.parameters.days * DAY_MS)

    def affinity(self, user: Ints, item: Ints, s: Floats) -> Floats:
        """v(s) · z of each (user, item, s)."""
        s = np.asarray(s, np.float32)[:, None]
        return np.einsum("nd,nd->n", (1 - s) * self.start_UD[user] + s * self.end_UD[user], self.item_ID[item])

    def click_probability(self, affinity: Floats, item: Ints, position: Ints, device: Ints) -> Floats:
        """Of an event; position counts from 1, device indexes DEVICES and is len(DEVICES) where missing."""
        logit = CLICK[0] + CLICK[1] * affinity + CLICK[2] * self.item_quality[item] + CLICK[3] * np.log(position)
        return _sigmoid(logit + DEVICE_EFFECT[device])

    def purchase_probability(self, affinity: Floats, price: Floats) -> Floats:
        """Of a click."""
        return _sigmoid(PURCHASE[0] + PURCHASE[1] * affinity + PURCHASE[2] * np.log(price / 20.0))

    def price(self, item: Ints, time: Ints) -> Floats:
        """An item's price on the day of a time: it moves by up to 15 % over a week."""
        day = (np.asarray(time) - START_MS) // DAY_MS
        return np.round(self.item_price[item] * (1 + 0.15 * np.sin(2 * np.pi * (day / 7 + self.item_phase[item]))), 2)

    def topics_now(self, s: float) -> Floats:
        """Shares of topics that exploration draws from: they rise and fall."""
        share = self.topic_share * (1 + 0.8 * np.sin(2 * np.pi * (s + self.topic_phase)))
        return share / share.sum()

    # ----------------------------------------------------------------- drawing

    def draw_users(self, rng: np.random.Generator, s: Floats) -> Ints:
        """A user for each s, by activity, among the first 60 % + 40 % · s, who have arrived."""
        arrived = np.minimum((self.parameters.users * (0.6 + 0.4 * s)).astype(np.int64), self.parameters.users - 1)
        return np.searchsorted(self._activity, rng.random(len(s)) * self._activity[arrived])

    def draw_items(self, rng: np.random.Generator, s: float, user: Ints, stratum: Ints) -> tuple[Ints, Floats]:
        """The logging policy: an item for each (user, stratum) at s -> (items, probability that this slot shows it)."""
        now = self.topics_now(s)
        u = rng.random(len(user))
        explored = np.searchsorted(np.cumsum(now)[:-1], u / EXPLORE)
        place = (u - EXPLORE) / (1 - EXPLORE)
        likes = self.likes_start_U3[user]
        which = (place >= LIKES[0]).astype(np.int8) + (place >= LIKES[0] + LIKES[1])
        topic = np.where(u < EXPLORE, explored, likes[np.arange(len(user)), which])
        cell = topic * STRATA + stratum
        end = np.searchsorted(self._sorted_birth, np.arange(CELLS) + s, side="right")
        low, weight = self._cumulative[self._first], self._cumulative[end] - self._cumulative[self._first]
        found = np.searchsorted(self._cumulative, low[cell] + rng.random(len(user)) * weight[cell], side="right") - 1
        item = self._order[np.minimum(found, end[cell] - 1)]
        liked = ((likes == topic[:, None]) * LIKES).sum(1)
        return item, ((1 - EXPLORE) * liked + EXPLORE * now[topic]) / STRATA * self.item_weight[item] / weight[cell]

    # ----------------------------------------------------------------- tables

    def items_table(self) -> pa.Table:
        """item_id, title, category: the words are the topic's."""
        rng = np.random.default_rng([*self._text_seed, 0])
        n = self.parameters.items
        first = rng.integers(0, WORDS.shape[1], n)
        second = (first + rng.integers(1, WORDS.shape[1], n)) % WORDS.shape[1]
        words = [pa.array(WORDS[self.item_topic, which], pa.string()) for which in (first, second)]
        adjective = pa.array(ADJECTIVES[rng.integers(0, len(ADJECTIVES), n)], pa.string())
        category = pa.array(np.array(TOPICS, dtype=object)[self.item_topic], pa.string())
        return pa.table(
            {"item_id": ids("i", n), "title": pc.binary_join_element_wise(adjective, *words, " "), "category": category}
        )

    def users_table(self) -> pa.Table:
        """user_id, age (5 % missing), gender, segment (15 % random); all go with the user's first topic at the start."""
        rng = np.random.default_rng([*self._text_seed, 1])
        n, topic = self.parameters.users, self.likes_start_U3[:, 0]
        age = np.clip(np.rint(22 + 2.5 * topic + 6 * rng.standard_normal(n)), 16, 90).astype(np.int64)
        gender = np.where(rng.random(n) < 0.2 + 0.2 * (topic % 4), "f", "m")
        group = np.where(rng.random(n) < 0.15, rng.integers(0, len(SEGMENTS), n), topic // 4)
        segment = np.array(list(SEGMENTS), dtype=object)[group]
        return pa.table(
            {
                "user_id": ids("u", n),
                "age": pa.array(age, mask=rng.random(n) < 0.05),
                "gender": pa.array(gender),
                "segment": pa.array(segment, pa.string()),
            }
        )

    def truth_tables(self) -> dict[str, pa.Table]:
        """The vectors behind the log, for those who do not use this class."""

        def vectors(values: Floats) -> pa.Array:
            return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).ravel()), values.shape[1])

        return {
            "users": pa.table(
                {"user_id": ids("u", self.parameters.users), "start": vectors(self.start_UD), "end": vectors(self.end_UD)}
            ),
            "items": pa.table(
                {
                    "item_id": ids("i", self.parameters.items),
                    "vector": vectors(self.item_ID),
                    "topic": pa.array(self.item_topic),
                    "quality": pa.array(self.item_quality),
                    "weight": pa.array(self.item_weight),
                    "birth": pa.array(self.item_birth),
                }
            ),
            "topics": pa.table({"topic": TOPICS, "vector": vectors(self.topic_TD), "share": self.topic_share}),
        }


def ids(letter: str, n: int) -> pa.Array:
    """letter and eight digits, from 0 to n - 1."""
    digits = pc.utf8_lpad(pa.array(np.arange(n)).cast(pa.string()), 8, "0")
    return pc.binary_join_element_wise(letter, digits, "")


def numbers(column: pa.ChunkedArray) -> Ints:
    """The numbers in ids that `ids` made."""
    return pc.utf8_slice_codeunits(column, 1).cast(pa.int64()).to_numpy()


def _unit(vectors: Floats) -> Floats:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))
