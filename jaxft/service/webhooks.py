"""Webhooks: URLs that are told how jobs end, until they answer.

Deliveries are signed as the Standard Webhooks specification says
(github.com/standard-webhooks/standard-webhooks), which `client.webhooks.unwrap` of the openai
package verifies.
"""

import base64
import hashlib
import hmac
import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import sqlalchemy as sa

from jaxft.service.settings import read_secret
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import Row, change, now

_SECONDS = 10.0
# Waits before a delivery is tried again: some two days in all.
_WAITS = (5, 30, 120, 600, 3600, 6 * 3600, 12 * 3600, 24 * 3600)

log = logging.getLogger("jaxft.service")


class Webhooks:
    """Delivers what the database says is to be delivered, in threads of its own."""

    def __init__(self, service: Service):
        self._service, self._urls = service, service.settings.webhooks
        secret = service.settings.webhook_secret
        self._key = read_secret(secret) if secret else b""
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="webhook")
        self._under_way: dict[str, Future[bool]] = {}

    def deliver(self) -> None:
        """Begins deliveries that are due, and notes those that are done."""
        table = schema.deliveries
        with self._service.database.read() as connection:
            due = sa.select(table).where(table.c.done_at.is_(None), table.c.next_at <= now())
            rows = {row["id"]: dict(row) for row in connection.execute(due).mappings()}
        for number, row in rows.items():
            if not self._urls:
                self._note(row, done=True)
            elif number not in self._under_way:
                self._under_way[number] = self._pool.submit(self._send_all, row["body"])
        for number, future in list(self._under_way.items()):
            if future.done():
                del self._under_way[number]
                if number in rows:
                    self._note(rows[number], done=future.result())

    def close(self) -> None:
        """Ends the threads; what was not delivered is delivered later."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _note(self, row: Row, *, done: bool) -> None:
        attempts = row["attempts"] + 1
        given_up = attempts > len(_WAITS)
        if given_up and not done:
            log.warning("webhook %s was given up after %d tries", row["id"], attempts)
        values: dict[str, Any] = {"attempts": attempts}
        if done or given_up:
            values["done_at"] = now()
        else:
            values["next_at"] = now() + _WAITS[attempts - 1]
        with self._service.database.write() as connection:
            change(connection, schema.deliveries, {"id": row["id"]}, **values)

    def _send_all(self, body: dict[str, Any]) -> bool:
        """Returns whether all URLs have taken it; one that has before gets it again."""
        taken = [self._send(url, body) for url in self._urls]
        return all(taken)

    def _send(self, url: str, body: dict[str, Any]) -> bool:
        text = json.dumps(body)
        try:
            answer = httpx.post(
                url, content=text, headers=signed(body["id"], text, self._key), timeout=_SECONDS
            )
        except httpx.HTTPError as error:
            log.warning("webhook %s: %s", url, error)
            return False
        return answer.is_success


def signed(number: str, text: str, key: bytes) -> dict[str, str]:
    """Returns the headers of a delivery, with its signature if there is a key."""
    moment = str(int(time.time()))
    headers = {
        "content-type": "application/json",
        "webhook-id": number,
        "webhook-timestamp": moment,
    }
    if key:
        digest = hmac.new(key, f"{number}.{moment}.{text}".encode(), hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers
