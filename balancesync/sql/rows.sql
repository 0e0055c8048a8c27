-- A mapping's rows as they go to Redis: put aside as one snapshot, then fetched a page at a time.
-- The cursor outlives its transaction: at COMMIT the server keeps the rows in a file of its own, and
-- holds no snapshot any more. https://www.postgresql.org/docs/current/sql-declare.html

-- name: put_aside
DECLARE {cursor} SCROLL CURSOR WITH HOLD FOR
SELECT {key_bytes}, {value_bytes} FROM {relation} AS t WHERE {keys_not_null} AND {wanted};

-- name: count
MOVE FORWARD ALL IN {cursor};

-- name: rewind
MOVE ABSOLUTE 0 IN {cursor};

-- name: fetch
FETCH FORWARD {rows} FROM {cursor};

-- name: close
CLOSE {cursor};
