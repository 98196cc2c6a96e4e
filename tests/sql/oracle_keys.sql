-- Look-ups by primary key that KalamDB and DuckDB define the same; each also runs through the engine.

-- name: by_id
SELECT * FROM trips WHERE id = 5;

-- name: by_id_of_a_deleted_row
SELECT * FROM trips WHERE id = 14;

-- name: by_id_of_a_row_inserted_again
SELECT * FROM trips WHERE id = 7;

-- name: by_id_of_an_updated_row
SELECT id, arr_delay, note FROM trips WHERE id = 21;

-- name: by_negative_id
SELECT * FROM trips WHERE id = -1;

-- name: by_unknown_id
SELECT * FROM trips WHERE id = 999999999;

-- name: by_id_as_text
SELECT * FROM trips WHERE id = '5';

-- name: by_id_as_decimal
SELECT * FROM trips WHERE id = 5.0;

-- name: by_id_between_two
SELECT * FROM trips WHERE id = 5.5;

-- name: by_id_as_float
SELECT * FROM trips WHERE id = 5e0;

-- name: by_null
SELECT * FROM trips WHERE id = NULL;

-- name: by_smallest_bigint
SELECT * FROM trips WHERE id = -9223372036854775808;

-- name: by_largest_bigint
SELECT * FROM trips WHERE id = 9223372036854775807;

-- name: by_more_than_bigint
SELECT * FROM trips WHERE id = 9223372036854775808;

-- name: with_limit
SELECT id FROM trips WHERE id = 5 LIMIT 1;

-- name: with_limit_of_none
SELECT id FROM trips WHERE id = 5 LIMIT 0;

-- name: with_alias
SELECT t.id, t.note AS n FROM trips AS t WHERE t.id = 21;

-- name: by_text
SELECT name, carrier FROM airlines WHERE carrier = 'UA';

-- name: by_text_in_other_case
SELECT name FROM airlines WHERE carrier = 'ua';

-- name: by_text_with_blank
SELECT name FROM airlines WHERE carrier = 'UA ';

-- name: by_empty_text
SELECT name FROM airlines WHERE carrier = '';

-- name: by_null_text
SELECT name FROM airlines WHERE carrier = NULL;

-- name: by_composite_key
SELECT * FROM routes WHERE carrier = 'UA' AND origin = 'EWR' AND dest = 'IAH';

-- name: by_composite_key_in_other_order
SELECT flights FROM routes WHERE dest = 'IAH' AND carrier = 'UA' AND origin = 'EWR';

-- name: by_part_of_a_composite_key
SELECT dest FROM routes WHERE carrier = 'OO' AND origin = 'EWR' ORDER BY dest;

-- name: by_composite_key_with_null
SELECT * FROM routes WHERE carrier = 'UA' AND origin = NULL AND dest = 'IAH';

-- name: by_composite_key_with_time
SELECT temp FROM weather WHERE origin = 'JFK' AND time_hour = TIMESTAMP '2013-02-01 12:00:00';
