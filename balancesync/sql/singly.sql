-- How a slice is written row by row, inside the server, where its one statement doesn't do it: each
-- row is locked, written and looked at, and what the table refuses is undone for that row alone.
-- Tens of thousands of rows a second, whatever share of them is refused.

-- name: create
-- PostgreSQL evaluates a function's plans once: a table that was small then mustn't be read whole.
CREATE OR REPLACE FUNCTION {write_singly} (bigint, bigint, timestamptz, uuid, text, "char", boolean, text)
RETURNS TABLE (row_end text, row_said text, row_key text[], row_values text[])
LANGUAGE plpgsql SET enable_seqscan = off AS {body};

-- name: call
SELECT * FROM {write_singly}($1, $2, $3, $4, $5, $6, $7, $8);

-- name: body
-- $1 < n <= $2 of the diff with the op $6. $3 is the time, $4 the run, $5 the mapping, $7 whether
-- changes are kept, $8 what the table's rules and triggers are. row_end is i, u or d: written so;
-- a: written with other values; s: nothing to do; g: the row is gone; r: refused, and why.
#variable_conflict use_variable
DECLARE
    s record;
    there boolean;
    differs boolean;
    is_at tid;
    was_at tid;
    is_in oid;
    was_in oid;
    was jsonb;
    becomes jsonb;
    written bigint;
BEGIN
    -- What is checked at the end of a transaction would be the fault of no row.
    SET CONSTRAINTS ALL IMMEDIATE;
    FOR s IN
        SELECT d.* FROM {diff} AS d
        WHERE {in_slice} AND d.op = $6
            -- Never true: it holds a lock on the table, so that it stays what {in_slice} found.
            AND NOT EXISTS (SELECT FROM {target} WHERE false)
        ORDER BY d.n
    LOOP
        FOR tries IN 1..3 LOOP
            row_end := NULL;
            row_said := NULL;
            BEGIN
                SELECT t.tableoid, t.ctid, {t_json}, {differs} INTO was_in, was_at, was, differs
                FROM {target} AS t WHERE {same_key} AND ($6 <> 'd' OR {is_ours}) FOR NO KEY UPDATE;
                there := FOUND;
                IF $7 AND EXISTS (
                    SELECT FROM {changes} AS c
                    WHERE c.mapping = $5 AND c.key = {s_key_texts} AND c.at = $3)
                THEN
                    row_end := 's';
                ELSIF $6 = 'd' THEN
                    DELETE FROM {target} AS t WHERE {same_key} AND {is_ours};
                    row_end := CASE WHEN there THEN 'd' ELSE 'g' END;
                    IF EXISTS (SELECT FROM {target} AS t WHERE {same_key} AND {is_ours}) THEN
                        RAISE EXCEPTION USING ERRCODE = 'BS000';
                    END IF;
                ELSIF NOT there AND $6 = 'u' THEN
                    row_end := 'g';
                -- With history, what others have made the same of is a change all the same.
                ELSIF there AND NOT differs AND NOT ($6 = 'u' AND $7) THEN
                    row_end := 's';
                ELSE
                    IF there THEN
                        UPDATE {target} AS t SET {set_values} WHERE {same_key};
                    ELSE
                        INSERT INTO {target} ({columns}{comma_synced_at})
                        VALUES ({s_keys}, {s_values}{comma_now});
                    END IF;
                    GET DIAGNOSTICS written = ROW_COUNT;
                    SELECT t.tableoid, t.ctid, {t_json}, {differs} INTO is_in, is_at, becomes, differs
                    FROM {target} AS t WHERE {same_key};
                    -- A row that was written lies in another place than before.
                    IF NOT FOUND OR there AND is_in = was_in AND is_at = was_at
                        OR NOT there AND written = 0 AND differs
                    THEN
                        RAISE EXCEPTION USING ERRCODE = 'BS000';
                    END IF;
                    row_end := CASE WHEN differs THEN 'a' WHEN there THEN 'u' ELSE 'i' END;
                END IF;
            EXCEPTION WHEN OTHERS OR assert_failure THEN
                IF SQLSTATE = '42501' OR left(SQLSTATE, 2) = ANY ({not_of_a_row}) THEN
                    RAISE;
                END IF;
                row_end := 'r';
                IF SQLSTATE <> 'BS000' THEN
                    row_said := SQLERRM;
                END IF;
                -- Others may have inserted it just now: then it's to be updated.
                CONTINUE WHEN SQLSTATE = '23505' AND NOT there
                    AND EXISTS (SELECT FROM {target} AS t WHERE {same_key});
            END;
            EXIT;
        END LOOP;
        IF $7 AND row_end IN ('i', 'u', 'a', 'd') THEN
            INSERT INTO {changes} (mapping, key, at, run_id, op, old, new)
            VALUES ($5, {s_key_texts}, $3, $4,
                (CASE WHEN $6 = 'd' THEN 'd' WHEN there THEN 'u' ELSE 'i' END)::"char",
                CASE WHEN there THEN was END, CASE WHEN $6 <> 'd' THEN becomes END);
        END IF;
        IF row_end = 'a' THEN
            INSERT INTO {altered} AS a (mapping, key, asked, stored, hooks, run_id)
            VALUES ($5, {s_key_texts}, {asked_json}, becomes, $8, $4)
            ON CONFLICT (mapping, key) DO UPDATE SET asked = EXCLUDED.asked, stored = EXCLUDED.stored,
                hooks = EXCLUDED.hooks, run_id = EXCLUDED.run_id;
        END IF;
        row_key := CASE WHEN row_end IN ('r', 'a') THEN ARRAY[{s_texts}] END;
        row_values := CASE WHEN row_end = 'r' THEN ARRAY[{s_value_texts}]::text[] END;
        RETURN NEXT;
    END LOOP;
END
