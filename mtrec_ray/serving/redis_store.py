"""Live histories in Redis or Valkey: for the replicas of a cluster. It knows no Ray.

    PREFIX:v:USER        hash: n (version), base (prepared data in it)
    PREFIX:ev:USER       sorted set of events: score the time, member "PLACE ITEM\\nBODY"
    PREFIX:seen:USER     hash: item -> first time
    PREFIX:ids:USER      set of event ids
    PREFIX:log           stream of accepted events
    PREFIX:shown         stream of lists that were shown
    PREFIX:items         hash: item -> its last state (JSON); PREFIX:items:order, sorted set: item by the number of its last change

One script keeps an event: all of it or nothing. Acknowledged means durable, so the server must have `appendonly yes` and
`appendfsync always`, which is checked at the start. In a Redis Cluster the prefix must hold a hash tag ({mtrec}).
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from mtrec_ray.histories import History
from mtrec_ray.serving.impressions import ShownList
from mtrec_ray.serving.items import FIELDS, StoredItem
from mtrec_ray.serving.sqlite_store import logged
from mtrec_ray.serving.store import Joining, Stored, StoredEvent, StoreError, events_of, history_of, users_of

# KEYS: version, events, seen, ids, log. ARGV: keep, user, then six of every event: id, item, time, shown, body, place ("" for one
# that is new and goes into the log)
_APPEND = """
local new, changed, before = {}, false, {}
if #ARGV > 2 and ARGV[8] ~= '' then  -- of the prepared data: what is there already is not kept twice
  local there = redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')
  for m = 1, #there, 2 do
    local tail = string.sub(there[m], 18)
    before[there[m+1] .. ' ' .. string.sub(tail, 1, string.find(tail, '\\n') - 1)] = true
  end
end
for a = 3, #ARGV, 6 do
  local id, item, time, shown, body, place = ARGV[a], ARGV[a+1], ARGV[a+2], ARGV[a+3], ARGV[a+4], ARGV[a+5]
  local fresh = true
  if id ~= '' then fresh = redis.call('SADD', KEYS[4], id) == 1 end
  if fresh then
    if place == '' then
      redis.call('XADD', KEYS[5], '*', 'u', ARGV[2], 'i', item, 't', time, 'e', id, 's', shown, 'b', body)
      place = string.format('%016d', 1000000000 + redis.call('INCR', KEYS[5] .. ':places'))
    elseif before[time .. ' ' .. item] then
      shown = '0'
    end
    if shown == '1' then
      redis.call('ZADD', KEYS[2], time, place .. ' ' .. item .. '\\n' .. body)
      local first = redis.call('HGET', KEYS[3], item)
      if not first or tonumber(time) < tonumber(first) then redis.call('HSET', KEYS[3], item, time) end
      changed = true
    end
  end
  table.insert(new, fresh and 1 or 0)
end
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -tonumber(ARGV[1]) - 1)
if redis.call('HEXISTS', KEYS[1], 'n') == 0 then  -- one that comes back after being forgotten has no version that it had before
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'n', now[1] .. string.format('%06d', now[2]))
elseif changed then redis.call('HINCRBY', KEYS[1], 'n', 1) end
return new
"""


class RedisStore(Joining):
    """A HistoryStore on a server. An item id holds no line break (preparation allows none in requests either)."""

    def __init__(
        self,
        url: str,
        actions: Sequence[str],
        context: Sequence[str],
        keep: int,
        prepared: Callable[[str], History | None] = lambda user_id: None,
        base: str = "",
        prefix: str = "{mtrec}",
        trust_durability: bool = False,
    ) -> None:
        """As SqliteStore. trust_durability: a managed server that does not tell its settings is taken to keep what it says."""
        try:
            import redis
        except ModuleNotFoundError:
            raise StoreError("Redis needs the package redis: pip install 'mtrec_ray[redis]'") from None
        self.actions, self.context, self.keep, self.prepared = actions, context, keep, prepared
        self.base, self.prefix = base, prefix
        self._error = redis.RedisError
        self._client: Any
        with self._errors():
            self._client = redis.Redis.from_url(url, decode_responses=True, socket_connect_timeout=2, socket_timeout=2)
            self._script = self._client.register_script(_APPEND)
            self._client.ping()
        if not trust_durability:
            self._check_durability()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self._error, ValueError) as error:
            raise StoreError(f"history store (Redis): {type(error).__name__}: {error}") from error

    def _check_durability(self) -> None:
        with self._errors():
            said = self._client.config_get("append*")
        only, sync = said.get("appendonly"), said.get("appendfsync")
        if only != "yes" or sync != "always":
            raise StoreError(
                f"history store (Redis): appendonly is {only!r}, appendfsync {sync!r}: an event that was acknowledged could be "
                "lost. Set `appendonly yes` and `appendfsync always`"
            )

    def _keys(self, user_id: str) -> list[str]:
        return [*(f"{self.prefix}:{kind}:{user_id}" for kind in ("v", "ev", "seen", "ids")), f"{self.prefix}:log"]

    def _read(self, user_id: str) -> tuple[Stored | None, str | None]:
        version, events, seen, *_ = self._keys(user_id)
        with self._errors():
            pipe = self._client.pipeline(transaction=True)
            pipe.hgetall(version).zrange(events, 0, -1, withscores=True).hgetall(seen)
            known, members, items = pipe.execute()
        if not known:
            return None, None
        rows = []
        for member, time in members:
            item, _, body = member[17:].partition("\n")
            rows.append((item, int(time), body))
        history = history_of(rows, [(i, int(t)) for i, t in items.items()], self.actions, self.context)
        return Stored(history, str(known["n"])), known.get("base")

    def append(self, events: Sequence[StoredEvent]) -> list[bool]:
        """Events of one user are kept all or none; of several users, user by user."""
        new: dict[int, bool] = {}
        by_user: dict[str, list[int]] = {}
        for place, event in enumerate(events):
            by_user.setdefault(event.user_id, []).append(place)
        for user_id, places in by_user.items():
            with self._errors():
                base = self._client.hget(self._keys(user_id)[0], "base")
            if base != self.base:
                self._join_one(user_id, self.prepared(user_id) or History())
            new |= dict(zip(places, self._kept(user_id, [(events[p], "") for p in places]), strict=True))
        return [new[place] for place in range(len(events))]

    def _kept(self, user_id: str, events: Sequence[tuple[StoredEvent, str]]) -> list[bool]:
        values: list[Any] = [self.keep, user_id]
        for e, place in events:
            values += [e.event_id or "", e.item_id, e.timestamp, int(e.shown), e.body(), place]
        with self._errors():
            return [bool(n) for n in self._script(keys=self._keys(user_id), args=values)]

    def _join_one(self, user_id: str, history: History) -> None:
        version, _, seen, *_ = self._keys(user_id)
        events = events_of(user_id, history)
        with self._errors():
            pipe = self._client.pipeline(transaction=True)
            for item, time in zip(history.seen_item_ids, history.seen_times, strict=True):
                pipe.hsetnx(seen, item, int(time))
            pipe.execute()
        self._kept(user_id, [(event, f"{place:016d}") for place, event in enumerate(events)])
        with self._errors():  # last: a join that was cut short is done again
            self._client.hset(version, "base", self.base)

    def load(self, rows: Iterable[pa.Table]) -> int:
        users = 0
        for user_id, history in users_of(rows):
            self._join_one(user_id, history)
            users += 1
        return users

    def forget(self, user_ids: Sequence[str]) -> int:
        removed, wanted = 0, set(user_ids)
        with self._errors():
            for stream in (f"{self.prefix}:log", f"{self.prefix}:shown"):
                for number, fields in self._client.xrange(stream):
                    if fields["u"] in wanted:
                        removed += int(self._client.xdel(stream, number))
            for user_id in wanted:
                version, events, seen, ids, _ = self._keys(user_id)
                removed += int(self._client.zcard(events)) + int(self._client.hlen(seen))
                self._client.delete(version, events, seen, ids)
            self._client.bgrewriteaof()  # the file of appended commands still names them until it is written anew
        return removed

    @property
    def identity(self) -> str:
        with self._errors():
            self._client.set(f"{self.prefix}:store", uuid.uuid4().hex, nx=True)
            return str(self._client.get(f"{self.prefix}:store"))

    def log(self, after: int, limit: int) -> list[tuple[int, StoredEvent]]:
        """Numbers are those of the stream, milliseconds · 2^20 + place."""
        with self._errors():
            found = self._client.xrange(f"{self.prefix}:log", _after(after), count=limit)
        return [(_number(name), logged(f["u"], f["i"], f["t"], f["e"] or None, f["b"], f["s"])) for name, f in found]

    def keep_impressions(self, lists: Sequence[ShownList]) -> None:
        with self._errors():
            pipe = self._client.pipeline(transaction=False)
            for shown in lists:
                pipe.xadd(f"{self.prefix}:shown", {"u": shown.user_id, "b": shown.body()})
            pipe.execute()

    def impressions(self, after: int, limit: int) -> list[tuple[int, ShownList]]:
        with self._errors():
            found = self._client.xrange(f"{self.prefix}:shown", _after(after), count=limit)
        return [(_number(name), ShownList.of(f["u"], f["b"])) for name, f in found]

    def change_item(self, item_id: str, fields: Mapping[str, Any]) -> StoredItem:
        states, order = f"{self.prefix}:items", f"{self.prefix}:items:order"
        out: list[StoredItem] = []
        with self._errors():

            def change(pipe: Any) -> None:  # begun anew when somebody else's change comes between
                known = pipe.hget(states, item_id)
                last = pipe.zrevrange(order, 0, 0, withscores=True)
                places = int(pipe.get(f"{order}:places") or 0)
                before = StoredItem(item_id) if known is None else _item(item_id, known)
                out[:] = [before.changed(int(last[0][1]) + 1 if last else 1, places, fields)]
                pipe.multi()
                pipe.hset(states, item_id, _state(out[0])).zadd(order, {item_id: out[0].number})
                if out[0].place == places:
                    pipe.set(f"{order}:places", places + 1)

            self._client.transaction(change, states, order, f"{order}:places")
        return out[0]

    def items_since(self, number: int) -> list[StoredItem]:
        states, order = f"{self.prefix}:items", f"{self.prefix}:items:order"
        with self._errors():
            names = self._client.zrangebyscore(order, f"({number}", "+inf")
            found = self._client.hmget(states, names) if names else []
        items = [_item(name, state) for name, state in zip(names, found, strict=True) if state is not None]
        return sorted(items, key=lambda i: i.number)

    def close(self) -> None:
        self._client.close()


def _after(number: int) -> str:
    """Where a stream goes on behind a number."""
    return "-" if number <= 0 else f"({number >> 20}-{number & 0xFFFFF}"


def _number(name: str) -> int:
    ms, _, place = name.partition("-")
    return (int(ms) << 20) + int(place)


def _state(item: StoredItem) -> str:
    vector = base64.b64encode(item.vector).decode()
    return json.dumps({**{f: getattr(item, f) for f in FIELDS}, "vector": vector, "number": item.number, "place": item.place})


def _item(item_id: str, state: str) -> StoredItem:
    fields = json.loads(state)
    return StoredItem(item_id, **{**fields, "vector": base64.b64decode(fields["vector"])})
