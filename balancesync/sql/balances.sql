-- Balances by their keys, for those who read them here while Redis is down.

-- name: rowless
SELECT w.n FROM unnest({arrays}) WITH ORDINALITY AS w ({keys}, n)
WHERE NOT EXISTS (SELECT FROM {table} AS t WHERE {same_key}) ORDER BY w.n;

-- name: read
SELECT w.n, {synced_at} AS synced_at, {values}
FROM unnest({arrays}) WITH ORDINALITY AS w ({keys}, n)
JOIN {table} AS t ON {same_key};
