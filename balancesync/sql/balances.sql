-- Balances by their keys, for those who read them here while Redis is down.

-- name: read
SELECT w.n, {synced_at} AS synced_at, {values}
FROM unnest({arrays}) WITH ORDINALITY AS w ({keys}, n)
JOIN {table} AS t ON {same_key};
